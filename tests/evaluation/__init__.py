"""Evaluation: equal to independent computations, intervals at their stated rate, resumed, refused with a reason."""
