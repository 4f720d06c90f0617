"""The signal by which a cluster requeues the job."""
