"""What the training program needs and no paper is about: errors, distributed set-up, checkpoints,
logging.
"""
