"""What the commands do, a file each; `tinsmith.cli` gives them their names and flags."""
