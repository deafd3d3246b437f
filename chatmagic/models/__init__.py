"""Models on disk and in memory: read, quantised, merged and written, without a publisher's code."""
