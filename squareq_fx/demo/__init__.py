"""A trained digits model shipped with the package, and the demonstration that runs on it."""
