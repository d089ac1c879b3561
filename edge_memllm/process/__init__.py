"""The process that runs us: its limits, its forks, the signals that end it."""
