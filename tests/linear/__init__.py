"""Linear solvers and roots of optimality conditions, against closed forms and central differences in float64."""
