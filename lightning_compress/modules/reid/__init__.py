"""Finding persons again in other cameras."""
