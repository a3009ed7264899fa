"""The pictures of the gallery: each example runs as it is, and what it has found is drawn.

python docs/pictures.py [EXAMPLE ...]     writes docs/pictures/EXAMPLE.svg
"""

import contextlib
import io
import os
import runpy
import sys
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.figure
import torch

import functrain as ft
from functrain.cli import plotting

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).with_name("pictures")
# the same bytes on every run, and letters as letters
STYLE = {"svg.hashsalt": "functrain", "svg.fonttype": "none", "font.size": 9, "path.simplify_threshold": 0.5}


def run(name, *words):
    """Run an example, in the working directory, and return what is defined at its end, and what it has printed."""
    said, before = io.StringIO(), sys.argv
    sys.argv = [name, *words]
    try:
        with contextlib.redirect_stdout(said):
            return runpy.run_path(str(ROOT / "examples" / f"{name}.py")), said.getvalue()
    finally:
        sys.argv = before


def recorded(name, *words, samples=None, tokens=None):
    """Run an example whose `ft.fit` has a record beside its own hooks; return the record's folder."""
    fit = ft.fit

    def with_record(*args, every, **named):
        return fit(*args, every=[*every, ft.train.record(name, samples=samples, tokens=tokens)], **named)

    ft.fit = with_record
    try:
        run(name, *words)
    finally:
        ft.fit = fit
    return Path(name)


def figure(columns=1, width=5.5, height=3.0):
    made = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(name, made):
    made.savefig(OUT / f"{name}.svg", metadata={"Date": None})


def digits_mlp():
    plotting.draw([recorded("digits_mlp")], OUT / "digits_mlp.svg", panels=["loss", "accuracy"])


def digits_cnn():
    found, _ = run("digits_cnn")
    batch = found["validation"][0]
    state = found["state"]
    logits, _ = found["net"].evaluate(state.params, state.buffers, None, batch["x"])
    digits("digits_cnn", batch, logits.argmax(1))


def vit_digits():
    found, _ = run("vit_digits")
    batch = found["validation"][0]
    digits("vit_digits", batch, found["vit"].apply(found["state"].params, batch["x"], found["config"]).argmax(1))


def digits(name, batch, said):
    right = batch["y"]
    made, axes = figure(columns=10, height=1.2)
    wrong = torch.nonzero(said != right)[:, 0].tolist()
    for one, row in zip(axes, [*wrong, *range(10)], strict=False):
        one.imshow(batch["x"][row, 0], cmap="gray_r", interpolation="nearest")
        color = "black" if said[row] == right[row] else "crimson"
        one.set_title(f"{said[row]}" + ("" if color == "black" else f", not {right[row]}"), color=color, fontsize=7)
        one.set_axis_off()
    save(name, made)


def train_gpt():
    plotting.draw([recorded("train_gpt", "--steps", "300", tokens="weight")], OUT / "train_gpt.svg")


def pretrain_llama():
    run("pretrain_llama", "--steps", "300", "--run", "pretrain_llama")
    plotting.draw([Path("pretrain_llama")], OUT / "pretrain_llama.svg")


def pretrain_bert():
    run("pretrain_bert", "--steps", "1000", "--run", "pretrain_bert")
    panels = ["masked_lm_loss", "next_sentence_loss"]
    plotting.draw([Path("pretrain_bert")], OUT / "pretrain_bert.svg", panels=panels)


def sweep_learning_rates():
    found, _ = run("sweep_learning_rates")
    made, (rates, fits) = figure(columns=2, width=6.5)
    over, losses = found["over"], found["metrics"]["loss"]
    rates.loglog(over["learning_rate"], losses, "o", alpha=0.7)
    rates.set(xlabel="learning rate", ylabel="loss after 300 steps", title="16 lanes: 4 rates, 4 seeds each")
    x = found["x"]
    fits.plot(x, torch.sin(3 * x), color="gray", label="sin(3 x)")
    for lane in (0, found["best"]):
        params = found["sweep"].lane(found["states"], lane).params
        hidden = torch.tanh(ft.nn.linear(x, **params["hidden"]))
        fits.plot(x, ft.nn.linear(hidden, **params["out"]), label=f"learning rate {over['learning_rate'][lane]:g}")
    fits.legend(loc="upper right")
    fits.set_ylim(-1.2, 2.2)
    save("sweep_learning_rates", made)


def maml_sinusoids():
    found, _ = run("maml_sinusoids")
    params, ((x, y), (x_test, y_test)) = found["state"].params, found["unseen"]
    task = 0
    start = ft.init_state(params, found["inner"], key=ft.random.key(0))
    after, _ = found["inner_step"](start, (x[task], y[task]))
    grid = torch.linspace(-5, 5, 100)[:, None]
    made, (axes,) = figure()
    points, values = torch.cat([x[task], x_test[task]]), torch.cat([y[task], y_test[task]])
    # a sine of any amplitude and phase is a sum of these two
    both = torch.linalg.lstsq(torch.cat([torch.sin(points), torch.cos(points)], 1), values).solution
    axes.plot(grid, torch.cat([torch.sin(grid), torch.cos(grid)], 1) @ both, color="gray", label="truth")
    axes.plot(x[task], y[task], "ko", markersize=4, label="ten points")
    for state, label in ((start, "before"), (after, "after one step")):
        h = grid
        for layer in state.params[:-1]:
            h = torch.tanh(ft.nn.linear(h, **layer))
        axes.plot(grid, ft.nn.linear(h, **state.params[-1]), label=label)
    axes.legend()
    save("maml_sinusoids", made)


def learned_loss():
    found, _ = run("learned_loss", "--steps", "100")
    meta = found["train"](found["network"])
    errors = torch.linspace(-10, 5, 120)  # of the prediction; wrong targets are too high
    losses = found["learned"](meta, errors)
    made, (axes,) = figure()
    axes.plot(errors, losses - losses.min(), label="learned loss")
    squares = errors**2
    axes.plot(
        errors, squares * (losses - losses.min()).max() / squares.max(), color="gray", label="squared error, scaled"
    )
    axes.set(xlabel="prediction minus target", ylabel="loss", title="a third of the targets is wrong, and too high")
    axes.legend()
    save("learned_loss", made)


def private_training():
    _, said = run("private_training")
    lines = [line.rpartition(": accuracy ") for line in said.splitlines()]
    made, (axes,) = figure(height=2.0)
    names = [name.split(",")[0] for name, _, _ in lines]
    bars = axes.barh(names, [float(value) for _, _, value in lines], color=["C0", "C0", "gray"])
    axes.bar_label(bars, padding=3)
    axes.set(xlabel="accuracy", xlim=(0.5, 1.05))
    axes.invert_yaxis()
    save("private_training", made)


def influence_of_labels():
    found, _ = run("influence_of_labels")
    is_wrong = torch.zeros(found["EXAMPLES"], dtype=torch.bool).index_fill(0, found["wrong"].long(), True)
    harm = found["harm"].detach()
    made, (axes,) = figure()
    edges = torch.linspace(float(harm.min()), float(harm.max()), 40).tolist()
    axes.hist([harm[~is_wrong].tolist(), harm[is_wrong].tolist()], edges, stacked=True, label=["right", "wrong label"])
    axes.set(xlabel="influence on the loss on clean data: right of 0 harms", ylabel="examples", yscale="log")
    axes.legend()
    save("influence_of_labels", made)


def laplace():
    found, _ = run("laplace")
    x = torch.linspace(-3.5, 3.5, 120)[:, None]
    made, (axes,) = figure()
    axes.plot(found["train"]["x"], found["train"]["y"], "k.", markersize=3, label="data")
    predicted = found["laplace"].predict(found["outputs_fn"], found["fits"]["all parameters"], {"x": x})
    mean = predicted.mean[:, 0]
    deviation = torch.sqrt(predicted.covariance[:, 0, 0] + found["NOISE"] ** 2)
    axes.plot(x, mean, label="network")
    axes.fill_between(x[:, 0], mean - 1.645 * deviation, mean + 1.645 * deviation, alpha=0.25, label="90 % interval")
    axes.plot(x, torch.sin(2 * x) + 0.5 * x, color="gray", linestyle=":", label="truth")
    axes.set_ylim(-4, 4)
    axes.legend(loc="upper left")
    save("laplace", made)


PICTURES = (
    digits_mlp, digits_cnn, vit_digits, train_gpt, pretrain_llama, pretrain_bert, sweep_learning_rates,
    maml_sinusoids, learned_loss, private_training, influence_of_labels, laplace,
)  # fmt: skip


def main(names):
    OUT.mkdir(exist_ok=True)
    for draw in PICTURES:
        if not names or draw.__name__ in names:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), matplotlib.rc_context(STYLE):
                draw()
            size = (OUT / f"{draw.__name__}.svg").stat().st_size
            print(f"{draw.__name__}.svg: {size / 1000:.0f} kB", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    main(sys.argv[1:])
