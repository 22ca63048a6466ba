"""Every number we publish: ``python -m benchmarks.<id>`` measures it, prints it as JSON and records it."""
