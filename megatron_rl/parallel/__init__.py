"""The mesh axes: devices, process groups, the pipeline schedule, and collectives over ranks."""
