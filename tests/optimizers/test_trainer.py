"""BlockwiseAdam in the Trainer of transformers: it trains, and a run that stopped goes on."""

import importlib.util

import pytest
import torch
from problems import hf_gpt2, hf_llama, transformers
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.optimizers import BlockwiseAdam

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("the Trainer of transformers needs accelerate", allow_module_level=True)

STEPS = 20
SAVED_AT = 8
TOKENS = (torch.arange(6) + torch.arange(32)[:, None]) % 11  # each one more than the last


def trainer_of(model, preset, folder, lr=3e-2):
    hf = transformers()
    optimizer = BlockwiseAdam(model, ht.partition(model, preset), lr=lr, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED_AT,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        use_cpu=True,
        dataloader_pin_memory=False,  # warns where there is no device to copy to
        report_to="none",
        disable_tqdm=True,
    )
    examples = [{"input_ids": row, "labels": row} for row in TOKENS]
    return hf.Trainer(model, arguments, train_dataset=examples, optimizers=(optimizer, scheduler))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("build", "preset"), [(hf_gpt2, "adam_mini"), (hf_llama, "adalayer_star")])
def test_trainer_trains_and_goes_on(build, preset, tmp_path):
    model = build()
    trainer = trainer_of(model, preset, tmp_path)
    trainer.train()
    steps = {int(state["step"]) for state in trainer.optimizer.optimizer.state.values()}
    assert steps == {STEPS}
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}  # the scheduler's, at its end

    torch.manual_seed(9)  # another start, and a rate that the checkpoint has to replace
    other = build()
    again = trainer_of(other, preset, tmp_path, lr=1.0)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED_AT}"))
    assert torch.equal(weights(other), weights(model))


def test_trainer_lowers_the_loss(tmp_path):
    model = hf_gpt2()
    before = model(TOKENS, labels=TOKENS).loss.item()
    trainer_of(model, "adam_mini", tmp_path).train()
    assert model.eval()(TOKENS, labels=TOKENS).loss.item() < 0.7 * before


def test_an_optimizer_that_the_trainer_makes_knows_no_blocks(tmp_path):
    hf = transformers()
    arguments = hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    made = hf.Trainer(hf_gpt2(), arguments, optimizer_cls_and_kwargs=(BlockwiseAdam, {"lr": 1e-2}))
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        made.create_optimizer()
