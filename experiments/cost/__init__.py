"""Cost: time and memory, interleaved in one process (`measure`). `benchmark` measures prepared arms (`benchmark_arms`)
at the sizes of `benchmark_cases`, `arm_cost` the arms of a sweep; `gpu` does both the benchmark and the checks of
`correctness`, piece by piece in a process beside this one (`supervised`). Rows come out; reports write them up.
"""
