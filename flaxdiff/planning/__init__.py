"""Planning: what a run would cost on TPUs that are described, not present.

`chips` knows the TPUs by their public figures and describes slices of them to the compiler; `hlo` reads what the
compiler made of a program; `plan` says which programs a run consists of and compiles them from configurations alone;
`report` turns the findings into a table and a verdict.
"""
