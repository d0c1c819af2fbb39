"""The places a job can run in: one module each, same contract."""
