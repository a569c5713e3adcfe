"""Teachers, taps on features, losses."""
