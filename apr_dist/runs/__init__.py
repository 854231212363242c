"""What a run leaves and reads back: its folder, saves, metrics, log, trackers, display and verdict."""
