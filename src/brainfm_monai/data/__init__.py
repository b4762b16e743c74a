"""Subjects on disk: their preparation and the lists that name them. Import what is needed from the modules."""
