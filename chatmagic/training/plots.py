"""The pictures of a run: the live curve, the final rank of every layer, importance over time.

Labels are Chinese and English at once. The Chinese ones are drawn with the few glyphs of Noto Sans CJK SC
(https://github.com/notofonts/noto-cjk, SIL Open Font License) in labels.otf, since few machines have such a font.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.figure import Figure
from peft import PeftModel
from torchkeras.kerascallbacks import VisMetric

from ..files import writing
from ..progress import Bar
from .adalora import importance_table, rank_table

if TYPE_CHECKING:
    from .keras import KerasModel

FONT = Path(__file__).with_name("labels.otf")
font_manager.fontManager.addfont(FONT)
FONTS = {"font.family": ["DejaVu Sans", font_manager.FontProperties(fname=FONT).get_name()]}


def pictures() -> list:
    """The callbacks that save pictures beside the adapter, and in a notebook show the first while it grows."""
    return [LiveCurve(), RankPictures()]


class EpochLines:
    """A line an epoch, where no bar and no picture are wanted."""

    def on_validation_epoch_end(self, model: "KerasModel") -> None:
        """Print the epoch's line."""
        log = {name: values[-1] for name, values in model.history.items()}
        line = [f"epoch {log.pop('epoch')}/{model.epochs}", *(f"{k} {v:.4g}" for k, v in log.items())]
        Bar.write(" ".join(line))  # above a bar that is being drawn


class StepBar:
    """A bar of the optimizer steps, with the time that is left."""

    def on_fit_start(self, model: "KerasModel") -> None:
        """Begin where the run does."""
        self.bar = Bar(desc="training", total=model.steps, initial=model.step, unit="step")

    def on_train_step_end(self, model: "KerasModel") -> None:
        """Move it on by what was made since."""
        self.bar.total = model.steps
        self.bar.set_postfix_str(f"epoch {model.state.epoch} of {model.epochs}", refresh=False)
        self.bar.update(model.step - self.bar.n)

    def on_fit_end(self, model: "KerasModel") -> None:
        """Leave it as it ended: all is done, though fewer steps than there might have been."""
        self.bar.update(model.step - self.bar.n)  # the epoch that it tells of is the last, no more the next
        self.bar.total = self.bar.n
        self.bar.refresh()
        self.bar.close()


class LiveCurve(VisMetric):
    """torchkeras' curve, saved as history.png beside the adapter, with its star on the epoch that was kept.

    The library begins with an empty picture, and its star may stand on an epoch whose ranks were not final.
    """

    def on_fit_start(self, model: "KerasModel") -> None:
        """Nothing is drawn before there is something to see."""
        self.metric = model.monitor.replace("val_", "")

    def update_graph(self, model: "KerasModel", *args: Any, **kwargs: Any) -> None:
        """Draw the curve anew, and save it."""
        with writing(model.ckpt_path / "history.png") as self.save_path:
            super().update_graph(model, *args, **kwargs)

    def get_best_score(self, model: "KerasModel") -> tuple[int, float]:
        """The epoch and score that were kept; before there are any, what draws no star."""
        return (model.best["epoch"], model.best["score"]) if model.best else (math.nan, math.nan)

    def get_title(self, model: "KerasModel") -> str:
        """What is said above the curve."""
        return super().get_title(model) if model.best else "no epoch counts before the ranks are final"


class RankPictures:
    """ranks.png and importance.png beside an AdaLoRA adapter, at the end of its run."""

    def on_fit_end(self, model: "KerasModel") -> None:
        """Save both pictures."""
        if model.allocator:
            pictures = {"ranks": plot_ranks, "importance": plot_importance}
            if not model.allocator.log:  # the ranks are of a run before this one
                del pictures["importance"]
            for name, draw in pictures.items():
                with writing(model.ckpt_path / f"{name}.png") as file:
                    draw(model.net).savefig(file, dpi=150)


def plot_ranks(model: PeftModel) -> Figure:
    """A matplotlib Figure: the final rank of every layer and projection of a trained AdaLoRA model."""
    ranks = rank_table(model.peft_config[model.active_adapter])
    with plt.rc_context(FONTS):
        figure, axes = plt.subplots(figsize=(6, 1.5 + 0.2 * len(ranks)), layout="constrained")
        image = axes.imshow(ranks, aspect="auto", cmap="YlGnBu")
        axes.set_xticks(range(ranks.shape[1]), ranks.columns, rotation=30, ha="right")
        axes.set_yticks(range(ranks.shape[0]), ranks.index)
        for row, column in [(row, column) for row in range(ranks.shape[0]) for column in range(ranks.shape[1])]:
            rank = ranks.iat[row, column]
            dark = rank > ranks.to_numpy().max() / 2
            axes.text(column, row, rank, ha="center", va="center", size=7, color="white" if dark else "black")
        axes.set_title(f"每层留下的秩 final ranks: {ranks.to_numpy().sum()}")
        axes.set_ylabel("层 layer")
        figure.colorbar(image, label="秩 rank")
    plt.close(figure)  # a notebook shows what a cell returns; an open figure it would show twice
    return figure


def plot_importance(model: PeftModel, layers: int = 3) -> Figure:
    """A matplotlib Figure: the importance over time, in the AdaLoRA training of `model`, of the `layers` that end
    highest, in the middle and lowest."""
    table = importance_table(model)
    order = table.columns[table.iloc[-1].argsort()][::-1]
    middle = len(order) // 2
    with plt.rc_context(FONTS):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name in dict.fromkeys([*order[:layers], *order[middle : middle + layers], *order[-layers:]]):
            axes.plot(table.index, table[name], label=name)
        axes.set_yscale("log")
        axes.set_title("重要性的变化 importance over time")
        axes.set_xlabel("步 step")
        axes.set_ylabel("重要性 importance")
        axes.legend(fontsize=7, ncols=3)
    plt.close(figure)
    return figure
