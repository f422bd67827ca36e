"""The tracker inside the real Trainer and the real lightning.Trainer."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.problem.vision import repair
from hessian_tools.tracking import Track, follow_trainer, lightning_callback
from hessian_tools.tracking.trainers import innermost, problem_of

repair()
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.2, embd_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def examples(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(20, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row, "unused": row} for row in tokens]


def trainer_of(folder: Path, model: nn.Module, steps: int = STEPS, **more: object):
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        **more,
    }
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(model, arguments, train_dataset=examples())


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def losses(trainer: object) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def measured(trainer: object) -> dict[int, float]:
    return {
        line["step"]: line["hessian/largest"]
        for line in trainer.state.log_history
        if "hessian/largest" in line
    }


def test_a_trainer_trains_the_same_and_logs_curvature(tmp_path):
    alone = trainer_of(tmp_path / "alone", network())
    alone.train()
    watched = trainer_of(tmp_path / "watched", network())
    tracker = follow_trainer(watched, every=2, readings=["largest", "update_sharpness"])
    watched.train()
    assert losses(alone) == losses(watched)
    for one, other in zip(weights(alone.model), weights(watched.model), strict=True):
        assert torch.equal(one, other)
    assert tracker.track.steps.tolist() == [0, 2, 4, 6]
    found = measured(watched)
    assert list(found.values()) == tracker.track.readings["largest"].tolist()
    sharpness = tracker.track.readings["update_sharpness"]
    assert math.isnan(sharpness[0]) and all(map(math.isfinite, sharpness[1:]))
    # the last one is of the weights that are there now, without dropout
    copied = copy.deepcopy(watched.model).eval()
    problem = ht.Problem(copied, ht.huggingface, tracker.operator.problem.batches)
    fresh = ht.top_eigenpairs(ht.HessianOperator(problem), 1, tolerance=1e-5, progress=False)
    last = {name: values[-1] for name, values in tracker.track.readings.items()}
    assert abs(last["largest"] - float(fresh.values[0])) <= last["largest_residual"]


def test_checkpoints_keep_the_trackers_state(tmp_path):
    journal = tmp_path / "curvature.jsonl"
    first = trainer_of(tmp_path, network(), steps=3)
    follow_trainer(first, every=1, readings=["largest"], journal=journal)
    first.train()
    again = trainer_of(tmp_path, network(), steps=5)
    tracker = follow_trainer(again, every=1, readings=["largest"], journal=journal)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tracker.steps == 5
    assert Track.read(journal).steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(measured(again)) == [0, 1, 2, 3, 4, 5]  # each once: 0 to 3 by the first run


def test_mixed_precision_is_measured_without_it(tmp_path):
    model = network()
    trainer = trainer_of(tmp_path, model, steps=2, bf16=True)
    tracker = follow_trainer(trainer, every=2, readings=["trace"])
    trainer.train()
    assert "_original_forward" in model.__dict__  # accelerate's wrapper is back
    plain = ht.Tracker(tracker.operator.problem, readings=["trace"])
    found = tracker.track.readings["trace"][-1]
    assert plain.measure(0)["trace"] == pytest.approx(found, rel=1e-4)


def test_tensorboard_gets_the_readings(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        trainer = trainer_of(tmp_path, network(), report_to="tensorboard")
        tracker = follow_trainer(trainer, every=3, readings=["largest"])
        trainer.train()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = tmp_path.rglob("events.out*")
        events = EventAccumulator(str(file))
        events.Reload()
        tag = next(tag for tag in events.Tags()["scalars"] if tag.endswith("hessian/largest"))
        values = [(event.step, event.value) for event in events.Scalars(tag)]
    expected = tracker.track.readings["largest"].tolist()
    assert [step for step, _ in values] == [0, 3, 6]
    assert [value for _, value in values] == pytest.approx(expected, rel=1e-6)


def test_losses_and_data_that_are_not_the_models_own(tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = trainer_of(tmp_path, network()).args
    own = Own(network(), settings, train_dataset=examples())
    with pytest.raises(ValueError, match="a loss of its own"):
        follow_trainer(own)
    stream = trainer_of(tmp_path, network())
    stream.train_dataset = iter(examples())
    with pytest.raises(ValueError, match="no examples by number"):
        problem_of(stream)
    batch = {name: torch.stack([e[name] for e in examples(4)]) for name in ("input_ids", "labels")}
    own.model.eval()
    given = ht.Problem(own.model, ht.huggingface, [batch])
    assert follow_trainer(own, given, readings=["trace"]).operator.problem is given


def test_optimizers_are_unwrapped():
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    assert innermost(Wrapper(Wrapper(inner))) is inner is innermost(inner)


# ---------------------------------------------------------------------------------------- lightning


def lit(lightning):
    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 2))

        def training_step(self, batch, number):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Lit()


def fitted(lightning, folder, module, callbacks, steps=STEPS, checkpoint=None):
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (torch.randn(4, generator=generator), torch.randint(2, (), generator=generator))
        for _ in range(24)
    ]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    logger = lightning.pytorch.loggers.CSVLogger(str(folder))
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=5,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
    )
    torch.manual_seed(7)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def test_lightning_trains_the_same_and_logs_curvature(tmp_path):
    lightning = pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lightning, about workers and loggers
        alone = lit(lightning)
        fitted(lightning, tmp_path / "alone", alone, [])
        watched = lit(lightning)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
        watched.net.eval()
        problem = ht.Problem(watched.net, ht.cross_entropy, [(x, torch.arange(8) % 2)])
        watched.net.train()
        tracker = ht.Tracker(problem, every=2, readings=["largest", "critical_sharpness"])
        callback = lightning_callback(tracker)
        trainer = fitted(lightning, tmp_path / "watched", watched, [callback])
        for one, other in zip(weights(alone), weights(watched), strict=True):
            assert torch.equal(one, other)
        assert tracker.track.steps.tolist() == [0, 2, 4, 6]
        trainer.logger.save()
        text = next((tmp_path / "watched").rglob("metrics.csv")).read_text()
        assert "hessian/largest" in text.splitlines()[0] and len(text.splitlines()) == 5
        # a checkpoint holds the state, from which a run goes on
        path = tmp_path / "saved.ckpt"
        trainer.save_checkpoint(path)
        more = lit(lightning)
        more.net.eval()
        follow = ht.Tracker(
            ht.Problem(more.net, ht.cross_entropy, problem.batches), every=2, readings=["largest"]
        )
        more.net.train()
        fitted(lightning, tmp_path, more, [lightning_callback(follow)], STEPS + 2, str(path))
        assert follow.steps == STEPS + 2 and follow.track.steps.tolist() == [STEPS + 2]
