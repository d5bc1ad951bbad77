"""Cost: time and memory, interleaved in one process (`measure`), of the benchmark's cases and of a sweep's arms."""
