"""Training: `loop` runs one. `setup` opens what its settings name, `views` cuts what each step sees, `optimiser`
updates the weights, `state` keeps everything the next step depends on, `validation` and `curves` watch. Beside it
`benchmark` times whole steps, and `distillation` makes the embedded encoder.
"""
