"""Methods that zero or factorise weights."""
