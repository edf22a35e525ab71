"""What any trainer needs: configuration, checkpoints, processes, logs, metrics. Knows no CSS."""
