"""Used by all other packages: errors, messages, files, locks, limits, text for a terminal."""
