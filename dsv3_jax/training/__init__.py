"""Training: state, losses, optimizer and schedules, the step, and what a run reports."""
