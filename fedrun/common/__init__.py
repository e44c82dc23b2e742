"""What every wing may use: errors, files, locks, and text for a terminal."""
