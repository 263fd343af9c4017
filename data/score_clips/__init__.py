"""Real scores from music21's corpus, played by real instruments, with captions that are true."""
