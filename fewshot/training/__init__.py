"""What a run goes through: launch, folder, state, schedule, stages; knows no test."""
