"""Packed rows: the same numbers and gradients as rows apart, what cannot be packed is noticed, the cache with room."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
)

from summarize_from_feedback_details import ppo_left_padding, reward, sft
from summarize_from_feedback_details.common import (
    engines,
    logprobs,
    packed_rows,
    policies,
    reward_models,
    sampling,
    training,
)
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.decoding import RoomyLayer
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.packed_rows import (
    logits_at,
    pack_pieces,
    pack_rows,
    pack_shared,
    packed_attention,
    supports_packing,
    use_packed_attention,
)
from summarize_from_feedback_details.common.precision import cast_parameters, use_float32_head

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
ROWS = [[3, 4, 5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def compare_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """To 1e-5 of the largest gradient."""
    pairs = [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters())]
    assert all((p is None) == (q is None) for p, q in pairs) and any(p is not None for p, _ in pairs)
    pairs = [(p, q) for p, q in pairs if p is not None]
    largest = max(float(q.abs().max()) for _, q in pairs)
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5 * max(1.0, largest))


def test_shared_layout_by_hand():
    """Neighbours with the same head read it once; a row whose head nobody shares is one piece."""
    heads, tails = [[1, 2], [1, 2], [3], [], [], [1, 2]], [[5], [6, 7], [8, 9], [4], [6], [7]]
    inputs, ends, firsts = pack_shared(heads, tails, "cpu")
    assert inputs["input_ids"][0].tolist() == [1, 2, 5, 6, 7, 3, 8, 9, 4, 6, 1, 2, 7]
    assert inputs["position_ids"][0].tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 0, 0, 0, 1, 2]
    assert inputs["pieces"] == [(2, None), (1, 0), (2, 0), (3, None), (1, None), (1, None), (3, None)]
    assert ends == [1, 1, 5, 7, 8, 11] and firsts == [2, 3, 6, 8, 9, 12]
    inputs, _, _ = pack_shared([[1], [2]], [[5], [6]], "cpu")  # of the same length, but not the same
    assert inputs["input_ids"].tolist() == [[1, 5, 2, 6]] and inputs["pieces"] == [(2, None), (2, None)]


def test_a_query_that_responses_share_gives_the_same_numbers(world):
    """Log-probabilities, rewards, samples and gradients of k responses to a query: as of rows apart."""
    policy, plain = (policies.load_policy("x", world.sft) for _ in range(2))
    plain.set_attn_implementation("sdpa")
    reward_model = reward_models.load_reward_model(world.reward)
    assert supports_packing(policy) and supports_packing(reward_model) and not supports_packing(plain)
    queries = [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [11, 12, 13], [11, 12, 13]]
    responses = [[3, 4, 0], [8, 0], [11, 12, 13, 14, 0], [2], [6, 7], [0]]
    read = lambda model: logprobs.token_logprobs(*logprobs.response_logits(model, queries, responses), 0.7)
    ours, theirs = read(policy), read(plain)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    (ours * torch.arange(len(ours))).sum().backward()
    (theirs * torch.arange(len(theirs))).sum().backward()
    compare_gradients(policy, plain)
    rows = [query + response for query, response in zip(queries, responses)]
    with torch.no_grad():
        shared = reward_models.read_rewards(reward_model, rows, list(map(len, queries)))
        alone = torch.cat([reward_models.read_rewards(reward_model, [row]) for row in rows])
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    ids, tokens = (
        TokenIds(policy.config.vocab_size, 0, 100),
        sampling.pad_rows(queries, policy.config.vocab_size, "left"),
    )
    found = [sampling.sample_responses(model, tokens, episode_keys(1, range(6), "cpu"), ids, 8, 1.0)
             for model in (policy, plain)]  # fmt: skip
    assert torch.equal(found[0][0], found[1][0]) and len({tuple(row) for row in found[0][0].tolist()}) > 3
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro, together, rank, world_size, expected", [
    (4, 4, 0, 1, [[4, 5, 6, 7], [0, 1, 2, 3]]), (4, 2, 0, 1, [[6, 7, 0, 1], [4, 5, 2, 3]]),
    (2, 4, 1, 2, [[4, 5], [0, 1]]), (1, 2, 0, 1, [[7], [6], [5], [4], [3], [2], [1], [0]]),
])  # fmt: skip
def test_responses_to_a_query_stay_in_one_micro_batch(micro, together, rank, world_size, expected):
    """As many of them as fit: the longest first, and about as many tokens in each."""
    accelerator = SimpleNamespace(process_index=rank, num_processes=world_size)
    checkpoints = SimpleNamespace(args=SimpleNamespace(local_micro_batch_size=micro), poll=lambda: None)
    gradient = training.Gradient(accelerator, torch.nn.Linear(1, 1), None, checkpoints)
    found = list(gradient.micro_batches([1, 2, 3, 4, 5, 6, 7, 8], False, together))
    assert [part for part, _ in found] == expected and all(weight == 1 for _, weight in found)
    # of three pairs the second process has one: it reads the first once more, whole, without weight
    accelerator, checkpoints.args.local_micro_batch_size = SimpleNamespace(process_index=1, num_processes=2), 2
    gradient = training.Gradient(accelerator, torch.nn.Linear(1, 1), None, checkpoints)
    assert list(gradient.micro_batches([1] * 6, False, 2)) == [([2, 3], 1.0), ([0, 1], 0.0)]


def test_layouts_by_hand():
    inputs, starts = pack_rows(ROWS[:2], True, "cpu")
    assert inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9]] and starts == [0, 5]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]] and inputs["pieces"] == [(5, None), (2, None)]
    inputs, starts = pack_rows(ROWS[:2], False, "cpu")
    assert inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]] and starts == [0, 5]
    assert inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    inputs = pack_pieces([([1, 2], None), ([3], 0), ([4, 5], 0)], "cpu")
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3]] and inputs["pieces"] == [(2, None), (1, 0), (2, 0)]


@pytest.mark.parametrize("kind", [FalconConfig, BloomConfig])
def test_an_architecture_that_cannot_pack_is_noticed_and_padded(kind):
    """These two compute attention themselves; their padded rows give what each row gives alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES)).eval()
    training.disable_dropout(model)
    assert not use_packed_attention(model) and not supports_packing(model)
    inputs, starts = pack_rows(ROWS, supports_packing(model), "cpu")
    with torch.no_grad():
        for start, row in zip(starts, ROWS):
            alone = model(torch.tensor([row]), use_cache=False).logits[0, -1]
            at = torch.tensor([start + len(row) - 1])
            torch.testing.assert_close(logits_at(model, inputs, at)[0], alone, rtol=0, atol=1e-5)


class Ignores(torch.nn.Module):
    """A trunk that counts positions through all rows."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, position_ids, **inputs):
        plain = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return self.trunk(position_ids=plain, **inputs)


def test_an_architecture_that_ignores_positions_is_noticed():
    from test_ppo_left_padding import tiny_policy

    model = tiny_policy("gpt2")
    model.transformer = Ignores(model.transformer)
    assert not use_packed_attention(model) and model.config._attn_implementation == "sdpa"


class Fails(torch.nn.Module):
    """A trunk that raises an error: where rows are packed, where one row stands alone, or always."""

    def __init__(self, trunk, error: Exception, fails_on):
        super().__init__()
        self.trunk, self.error, self.fails_on = trunk, error, fails_on

    def forward(self, input_ids, **inputs):
        if self.fails_on(inputs | {"input_ids": input_ids}):
            raise self.error
        return self.trunk(input_ids, **inputs)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError, KeyError, TypeError])
@pytest.mark.parametrize(
    "fails_on", [lambda i: "pieces" in i, lambda i: len(i["input_ids"]) == 1], ids=["packed", "alone"]
)
def test_an_architecture_that_fails_falls_back_to_padded_rows(error, fails_on):
    from test_ppo_left_padding import tiny_policy

    model = tiny_policy("gpt2").train()
    model.transformer = Fails(model.transformer, error("no"), fails_on)
    assert not use_packed_attention(model) and model.config._attn_implementation == "sdpa" and model.training
    inputs, _ = pack_rows(ROWS, supports_packing(model), "cpu")
    assert logits_at(model, inputs, torch.tensor([4])).isfinite().all()


def test_an_architecture_that_reads_nothing_says_so():
    from test_ppo_left_padding import tiny_policy

    model = tiny_policy("gpt2")
    model.transformer = Fails(model.transformer, RuntimeError("sizes\ndo not match"), lambda i: True)
    with pytest.raises(
        SystemExit, match=r"^error: a GPT2LMHeadModel that cannot read .* \(RuntimeError: sizes do not match\)$"
    ):
        use_packed_attention(model)


def varlen_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`torch.nn.attention.varlen.varlen_attn`, which only GPUs have, as it is documented: row by row."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(query) == cu_seq_q[-1] and len(key) == cu_seq_k[-1]
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max() and window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist()):
        k, v = (states[c:d].repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[a:b], k) * (scale or query.shape[-1] ** -0.5)
        before = (torch.arange(b - a)[:, None] + (d - c) - (b - a)) - torch.arange(d - c)  # how far each key is behind
        hidden = (before < 0) | ((window_size[0] >= 0) & (before > window_size[0]))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.mark.parametrize("kernel", ["each piece", "all at once"])
@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt_neox"])
def test_packed_rows_are_rows_alone(kind, kernel, monkeypatch):
    """Rows, and a piece that continues another, beyond a sliding window: what each row gives alone, gradients too."""
    small = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 6}
    config = {
        "mistral": lambda: MistralConfig(**small), "gemma3": lambda: Gemma3TextConfig(**small, head_dim=8),
        "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=64),
    }[kind]()  # fmt: skip
    calls = []
    if kernel == "all at once":  # as on a GPU in bf16; that its kernel is one is asked in tests/test_gpu.py
        monkeypatch.setattr(packed_rows, "takes_varlen", lambda *_: True)
        monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: calls.append(1) or varlen_by_definition(*a, **k))
    rows = [*ROWS, list(range(1, 21))]
    found = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        if packed:
            assert use_packed_attention(model)
            calls.clear()
            inputs, starts = pack_rows(rows, True, "cpu")
            at = torch.tensor([s + len(r) - 1 for s, r in zip(starts, rows)])
            logits = logits_at(model, inputs, at)
            shared = pack_pieces([(rows[3][:12], None), (rows[3][12:], 0), ([7, 7, 7], 0)], "cpu")
            shared["pieces"] = list(shared["pieces"])  # as DistributedDataParallel hands them on
            logits = torch.cat([logits, logits_at(model, shared, torch.tensor([19, 22]))])
            assert len(calls) == (4 if kernel == "all at once" else 0)  # two layers, two passes
        else:
            alone = [*rows, rows[3], [*rows[3][:12], 7, 7, 7]]
            logits = torch.stack([model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in alone])
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        found.append((logits.detach(), model))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    compare_gradients(found[0][1], found[1][1])


def test_sampling_with_a_sliding_window():
    """Its cache keeps the last tokens of a row, so queries are read padded: the same tokens, beyond the window, too."""
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=20, num_key_value_heads=2, intermediate_size=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    queries, R = sampling.pad_rows([*ROWS, *ROWS], 63, "left"), 30
    found = []
    for _ in range(2):
        keys = episode_keys(1, range(len(queries)), torch.device("cpu"))
        found.append(sampling.sample_responses(model, queries, keys, TokenIds(63, 62, 63), R, 1.0))
        assert use_packed_attention(model)
    assert torch.equal(found[0][0], found[1][0]) and (found[0][0] != 63).sum(1).max() == R
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)
    for i, row in enumerate([*ROWS, *ROWS]):  # each response along a pass over its whole row
        written = [t for t in found[0][0][i].tolist() if t != 63]
        with torch.no_grad():
            logits = model(torch.tensor([row + written]), use_cache=False).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]
        torch.testing.assert_close(found[0][1][i, : len(written)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "gpt_neox"])
@pytest.mark.parametrize("look_every", [1, 4, 100])
def test_rows_that_have_ended_leave_the_batch(kind, look_every, monkeypatch):
    """Once half of it has, by the last look: the same responses as one by one, with fewer rows in a pass."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64}
    config = (
        GPTNeoXConfig(**sizes)
        if kind == "gpt_neox"
        else MistralConfig(**sizes, sliding_window=20, num_key_value_heads=2)
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert use_packed_attention(model)
    rows, ids, R = [[1 + i % 7] * (2 + i % 5) for i in range(16)], TokenIds(63, 20, 21), 40  # a token in 21 is EOS
    alone = [
        sampling.sample_responses(model, torch.tensor([row]), episode_keys(1, [i], "cpu"), ids, R, 1.0)
        for i, row in enumerate(rows)
    ]
    passes = []
    model.register_forward_hook(lambda module, given, kwargs, out: passes.append(kwargs["input_ids"]), with_kwargs=True)
    monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", look_every)
    keys = episode_keys(1, range(len(rows)), "cpu")
    responses, logprobs = sampling.sample_responses(model, sampling.pad_rows(rows, 63, "left"), keys, ids, R, 1.0)
    assert torch.equal(responses, torch.cat([tokens for tokens, _ in alone]))
    torch.testing.assert_close(logprobs, torch.cat([found for _, found in alone]), rtol=0, atol=1e-5)
    lengths = (responses != 63).sum(1)
    sizes = [len(tokens) for tokens in passes[1:]]
    assert lengths.float().std() > 5 and lengths.min() < 10
    if look_every == 100:
        assert sizes == [16] * (R - 1)
    else:
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 4 and len(set(sizes)) > 2
        assert look_every == 1 or all(i % 4 == 3 for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1])


def test_cudnn_plans_no_lengths():
    """Its attention makes a plan for each new length, for tens of milliseconds: never taken once rows are packed."""
    from test_ppo_left_padding import tiny_policy

    torch.backends.cuda.enable_cudnn_sdp(True)
    assert use_packed_attention(tiny_policy()) and not torch.backends.cuda.cudnn_sdp_enabled()


def test_packing_leaves_no_trace_in_a_checkpoint(tmp_path):
    from test_ppo_left_padding import tiny_policy

    model = tiny_policy()
    assert use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_cache_with_room():
    keys, values = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    layer = RoomyLayer(keys, values, room=2)
    more = torch.randn(2, 3, 2, 5)
    for t in range(2):
        found, _ = layer.update(more[:, :, t : t + 1], more[:, :, t : t + 1])
        assert layer.get_seq_length() == 5 + t and found.data_ptr() == layer.room[0].data_ptr()  # nothing is copied
    assert torch.equal(layer.keys, torch.cat([keys, more], 2))
    assert torch.equal(layer.values, torch.cat([values, more], 2))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_cross_entropy(temperature, dtype):
    """Value and gradient, over several slices; bf16 rounds its gradient once."""
    torch.manual_seed(0)
    logits, targets = torch.randn(100, 50_000).to(dtype), torch.randint(0, 50_000, (100,))
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    assert len(logprobs.row_slices(logits)) > 3
    expected = -torch.nn.functional.cross_entropy(plain.float() / temperature, targets, reduction="none")
    found = logprobs.token_logprobs(ours * 1, targets, temperature)  # a product: a leaf may not be written over
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn(100)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_head_in_float32():
    """In bf16, scores around 5 would be multiples of 1/32; the head is in float32, and its checkpoint as before."""
    from test_ppo_left_padding import tiny_reward

    model = tiny_reward()
    model.score.weight.data.mul_(50)
    names, weight = list(model.state_dict()), model.score.weight
    use_float32_head(model)
    assert list(model.state_dict()) == names and model.score.weight is weight
    hidden = torch.randn(200, 32)
    expected = hidden.bfloat16().float() @ weight.float().T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.score(hidden.bfloat16()), expected, rtol=0, atol=1e-4)
    model.bfloat16()  # as under DeepSpeed
    found = model.score(hidden.bfloat16())
    assert found.dtype == torch.float32
    assert not torch.equal(weight.float(), weight.master)
    torch.testing.assert_close(found, hidden.bfloat16().float() @ weight.master.T, rtol=0, atol=1e-4)  # never rounded
    found.sum().backward()  # the gradient goes to what DeepSpeed trains
    torch.testing.assert_close(weight.grad[0], hidden.bfloat16().float().sum(0).bfloat16(), rtol=1e-2, atol=1e-2)


def test_only_parameters_are_cast():
    """`model.bfloat16()` would round the rotary frequencies, too: another network at large positions."""
    from test_ppo_left_padding import tiny_reward

    model, rounded = tiny_reward(), tiny_reward()
    use_float32_head(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any(buffer.is_floating_point() for buffer in buffers.values())
    cast_parameters(model, torch.bfloat16)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert {p.dtype for name, p in model.named_parameters() if name != "score.weight"} == {torch.bfloat16}
    assert torch.equal(model.score.weight, rounded.score.weight)
    with torch.no_grad():  # otherwise the same as a float32 model of rounded weights
        for name, p in rounded.named_parameters():
            if name != "score.weight":
                p.copy_(p.bfloat16())
        tokens = torch.arange(1, 60)[None]
        ours, theirs = (m.gpt_neox(tokens).last_hidden_state.float() for m in (model, rounded))
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_packed_rows_attend_in_float32_on_a_cpu():
    """Also where all else is bf16; what comes out is rounded once, gradients flow."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8).bfloat16().requires_grad_() for _ in range(3))
    pieces = [(5, None), (4, None), (3, 0)]
    module = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(module, q, k, v, None, pieces=pieces)
    wide, _ = packed_attention(module, q.float(), k.float(), v.float(), None, pieces=pieces)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
    found.float().sum().backward()
    assert all(states.grad is not None and states.grad.dtype == torch.bfloat16 for states in (q, k, v))


def test_only_what_is_needed_is_computed():
    """Packed, no pad goes through the trunk and logits exist at response tokens only; a shared query is read once."""
    from test_ppo_left_padding import tiny_policy, tiny_reward

    policy, scorer = tiny_policy(), tiny_reward()
    assert use_packed_attention(policy) and use_packed_attention(scorer)
    read, said = [], []
    for model in (policy, scorer):
        model.gpt_neox.embed_in.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    policy.lm_head.register_forward_hook(lambda _, given, __: said.append(given[0].shape[:-1].numel()))
    queries, responses = [[1, 2, 3], [4, 5, 6, 7, 8]], [[9, 0], [10, 11, 12, 0]]
    with torch.no_grad():
        ppo_left_padding.response_logits(policy, queries, responses)
        assert (sum(read), sum(said)) == (3 + 2 + 5 + 4, 2 + 4)
        rows = [(q + r, len(r)) for q, r in zip(queries, responses)]
        for query_loss_weight, logits in ((0.0, 2 + 4), (1.0, 2 + 4 + 2 + 4)):  # nothing predicts a row's first token
            read.clear(), said.clear()
            sft.batch_losses(sft.Policy(policy), rows, query_loss_weight, True, "cpu")
            assert (sum(read), sum(said)) == (3 + 2 + 5 + 4, logits)
        pairs = [([1, 2, 3, 9, 0], [1, 2, 3, 10, 11, 0])]
        for shared, tokens in ((True, 3 + 2 + 3), (False, 5 + 6)):
            read.clear()
            reward.pair_rewards(reward.RewardModel(scorer), pairs, True, shared, "cpu")
            assert sum(read) == tokens


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_token_waits_for_nothing(kind, monkeypatch):
    """Between two looks nothing is read from the device: a GPU then never waits for Python, nor Python for it."""
    waits, aten = [], torch.ops.aten

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operator = function.overloadpacket
            places = args[1] if operator in (aten.index, aten.index_put_, aten.index_put) else ()
            waits.extend(place for place in places if place is not None and place.dtype == torch.bool)
            waits.extend(
                [function] * (operator in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal))
            )
            return function(*args, **kwargs or {})

    for name in ("tolist", "numpy", "cpu"):  # which on a CPU are no operation
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *a, plain=plain, **b: waits.append(plain) or plain(x, *a, **b)
        )
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config((GPTNeoXConfig if kind == "gpt_neox" else LlamaConfig)(**sizes)).eval()
    assert use_packed_attention(model)
    queries = sampling.pad_rows([[1 + i % 7] * (2 + i % 5) for i in range(8)], 63, "left")
    monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", 8)
    found = []
    for R in (1, 7, 15):  # no look, none, one
        waits.clear()
        with Reads():
            sampling.sample_responses(model, queries, episode_keys(1, range(8), "cpu"), TokenIds(63, -1, 63), R, 1.0)
        found.append(len(waits))
    assert found[0] == found[1] == found[2] - 1


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "bloom"])
def test_decoding_with_fixed_shapes(kind, monkeypatch):
    """What a graph would replay: all rows, the same shapes and places at each token; and the same results."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
    configs = {"gpt_neox": GPTNeoXConfig, "llama": LlamaConfig, "bloom": BloomConfig}
    model = AutoModelForCausalLM.from_config(configs[kind](**sizes)).eval()
    assert use_packed_attention(model) == (kind != "bloom")
    rows, ids, R = [[1 + i % 7] * (2 + i % 5) for i in range(16)], TokenIds(63, 20, 21), 40  # a token in 21 is EOS
    queries, keys, passes = sampling.pad_rows(rows, 63, "left"), episode_keys(1, range(16), "cpu"), []
    plain = sampling.sample_responses(model, queries, keys, ids, R, 1.0)
    fixed = ("input_ids", "attention_mask", "position_ids")
    see = lambda module, given, of: passes.append([(of[n].shape, of[n].data_ptr()) for n in fixed])
    model.register_forward_pre_hook(see, with_kwargs=True)
    responses, logprobs = engines.replay(model, queries, keys, ids, R, 1.0)
    assert torch.equal(responses, plain[0])
    torch.testing.assert_close(logprobs, plain[1], rtol=0, atol=1e-5)
    tokens = passes[1:]  # after the queries'
    assert len(tokens) > 20 and all(one == tokens[0] for one in tokens) == (kind != "bloom")
