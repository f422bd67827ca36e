"""Networks written here: options that the zoo leaves at their defaults."""

import torch

from hessian_tools.problem.networks import NanoGPT


def test_qk_norm_takes_the_scale_of_queries_and_keys_away():
    tokens = torch.randint(11, (2, 8))

    def change(qk_norm):
        torch.manual_seed(0)
        model = NanoGPT(11, 8, layers=2, d=16, num_heads=2, qk_norm=qk_norm)
        before = model(tokens)
        with torch.no_grad():
            for block in model.blocks:
                block.attention.query.weight.mul_(100)
        return (model(tokens) - before).abs().max()

    assert change(qk_norm=True) < 0.3 * change(qk_norm=False)


def test_qk_norm_changes_no_random_number():
    torch.manual_seed(0)
    plain = NanoGPT(11, 8)
    torch.manual_seed(0)
    normed = NanoGPT(11, 8, qk_norm=True)
    known = normed.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in plain.state_dict().items())
