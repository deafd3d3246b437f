"""The pictures of a run: the live curve, the final rank of every layer, importance over time."""

from torchkeras.kerascallbacks import VisMetric


class LiveCurve(VisMetric):
    """torchkeras' curve, saved beside the adapter, with its star on the epoch that was kept.

    The library's own star may stand on an epoch whose ranks were not final.
    """

    def on_fit_start(self, model):
        self.save_path = model.ckpt_path / "history.png"
        super().on_fit_start(model)

    def get_best_score(self, model):
        if model.best:
            return model.best["epoch"], model.best["score"]
        return super().get_best_score(model)
