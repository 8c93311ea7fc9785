"""Programs as TensorRT networks of its native layers, and plans of those.

    program + weights -> check (targets.py) -> lower (lower.py) -> LoweredNetwork -> build (build.py) -> plan

`lower` decides what is computed and touches no option of the builder; `build` decides how and knows no operator. Neither imports
a TensorRT package: `engine.tensorrt.load` does, when it is used.
"""
