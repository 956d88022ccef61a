"""Settings of a run of 20 steps on the 120 pictures of conftest; it takes about a second."""

TINY = {
    "backbone": "small-convnet",
    "image_size": 16,
    "batch_size": 24,
    "epochs": 4,
    "embedding_dim": 16,
    "projector_hidden_dim": 24,
    "predictor_hidden_dim": 24,
    "support_set_size": 50,  # no multiple of the batch
    "optimizer": "lars",
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 0,
    "log_every_steps": 2,
    "evaluate_every_epochs": 2,
    "checkpoint_every_steps": 3,
    "quiet": True,
}
