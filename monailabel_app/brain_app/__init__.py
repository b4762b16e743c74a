"""Tasks of the app, one module for each kind."""
