"""A graph for people: as Python to read, as a table of its layers' decisions, as a picture."""
