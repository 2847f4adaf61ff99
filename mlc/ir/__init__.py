"""The intermediate representation: values, equations, regions, programs.  Imports nothing else of mlc."""
