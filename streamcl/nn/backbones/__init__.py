"""Where features come from: one file per backbone."""
