"""What is learnt from runs: reading run directories, reports, fits."""
