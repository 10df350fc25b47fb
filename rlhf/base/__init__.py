"""What every other package may import: errors, files, messages, model locations. No torch here."""
