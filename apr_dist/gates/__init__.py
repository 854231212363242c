"""What stands between the files and the first step: each gate a pure function of facts."""
