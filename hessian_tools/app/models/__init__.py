"""What ``--model`` may name besides the zoo: a file of the user's, or a saved folder.

Reading order: user_model; saved_model, saved_data, saved_problem.
"""
