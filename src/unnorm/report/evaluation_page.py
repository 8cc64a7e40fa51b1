"""placeholder"""
def render_evaluation(results): return ""
