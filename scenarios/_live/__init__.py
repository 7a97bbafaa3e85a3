"""What the live stream is made of: intake, the spool on disk, and where tasks are cut."""
