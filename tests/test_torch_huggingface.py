"""`apply_to`: causal language models of transformers, from random weights, beside the same models as they are."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swl.torch
from swl.torch._huggingface import LazyLogits

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn of their own things

SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OLD = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZE),
    "mistral": lambda: transformers.MistralConfig(**SIZE),
    "qwen2": lambda: transformers.Qwen2Config(**SIZE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE),
    "gemma2": lambda: transformers.Gemma2Config(**SIZE, final_logit_softcapping=2.0),
    "phi": lambda: transformers.PhiConfig(**SIZE),  # its head has a bias
    "gpt2": lambda: transformers.GPT2Config(**OLD, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: transformers.OPTConfig(
        **OLD, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "granite": lambda: transformers.GraniteConfig(**SIZE, logits_scaling=3.0),
    "cohere": lambda: transformers.CohereConfig(**SIZE, logit_scale=0.3),
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, num_local_experts=4),
}
FIVE = ["llama", "qwen3", "gemma2", "gpt2", "opt"]


def build(name: str, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(dtype)  # eval: no dropout
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def same_loss(plain: Any, fused: Any, **inputs: Any) -> Any:
    """Compare losses and gradients; return what the fused model gave."""
    want, got = plain(**inputs), fused(**inputs)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    for model, output in ((plain, want), (fused, got)):
        model.zero_grad()
        output.loss.backward()
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-4, atol=1e-6)
    return got


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_models_and_so_is_all_else(name: str) -> None:
    plain, fused = build(name), build(name)
    swl.torch.apply_to(fused)
    output = same_loss(plain, fused, **batch())
    assert isinstance(output.logits, LazyLogits)
    ids = batch()["input_ids"]
    want = plain(input_ids=ids).logits
    got = fused(input_ids=ids).logits
    assert type(got) is Tensor
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(output.logits + 0, want, rtol=0, atol=0)
    write = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(ids, **write), plain.generate(ids, **write))


@pytest.mark.parametrize("name", FIVE)
def test_thirty_steps_of_training_have_the_same_losses(name: str) -> None:
    def train(fused: bool) -> list[float]:
        model, losses = build(name), []
        if fused:
            swl.torch.apply_to(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(30):
            loss = model(**batch(step % 3)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    want = train(fused=False)
    assert want[-1] < want[0] - 0.1
    assert train(fused=True) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": batch(5)["input_ids"]},
        {"logits_to_keep": 17},
    ],
    ids=lambda options: f"{next(iter(options))}-{type(next(iter(options.values()))).__name__}",
)
def test_options_of_the_loss(options: dict[str, Any]) -> None:
    plain, fused = build("llama"), build("llama")
    swl.torch.apply_to(fused)
    same_loss(plain, fused, **(batch() | {"input_ids": batch(1)["input_ids"]}), **options)


def test_what_a_model_adds_to_the_loss_stays() -> None:
    plain, fused = build("mixtral"), build("mixtral")
    swl.torch.apply_to(fused)
    output = same_loss(plain, fused, **batch(), output_router_logits=True)
    assert output.aux_loss.item() > 0


@pytest.mark.parametrize("labelled", [True, False])
def test_outputs_as_tuples(labelled: bool) -> None:
    plain, fused = build("gpt2"), build("gpt2")
    swl.torch.apply_to(fused)
    inputs = batch() if labelled else {"input_ids": batch()["input_ids"]}
    want, got = (model(**inputs, return_dict=False) for model in (plain, fused))
    assert len(got) == len(want)
    assert type(got[0]) is Tensor
    torch.testing.assert_close(got[0], want[0])


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_16_bit(how: str) -> None:
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    plain, fused = build("gemma2", dtype), build("gemma2", dtype)
    swl.torch.apply_to(fused)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        want, got = plain(**batch()), fused(**batch())
    assert got.loss.dtype is want.loss.dtype is torch.float32
    torch.testing.assert_close(got.loss, want.loss, rtol=5e-3, atol=0)  # theirs rounds the logits
    assert got.logits.dtype is want.logits.dtype
    torch.testing.assert_close(got.logits + 0, want.logits)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=0.1, atol=0.01)


def test_gradient_checkpointing() -> None:
    plain, fused = build("llama").train(), build("llama").train()
    fused.gradient_checkpointing_enable()
    swl.torch.apply_to(fused)
    same_loss(plain, fused, **batch())


@pytest.mark.parametrize("first", ["peft", "swl"])
def test_low_rank_adapters_on_the_body(first: str) -> None:
    import peft

    def adapted(fused: bool) -> Any:
        model = build("llama")
        if fused and first == "swl":
            swl.torch.apply_to(model)
        torch.manual_seed(1)
        adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, adapters)
        if fused and first == "peft":
            swl.torch.apply_to(model)
        return model

    fused = adapted(fused=True)
    assert isinstance(same_loss(adapted(fused=False), fused, **batch()).logits, LazyLogits)
    assert fused.generate(input_ids=batch()["input_ids"], max_new_tokens=2, pad_token_id=0).shape == (2, 19)


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    plain, fused = build("gemma2"), build("gemma2")
    swl.torch.apply_to(fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    same_loss(plain, compiled, **batch(), use_cache=False)
    torch.testing.assert_close(compiled(batch()["input_ids"]).logits, plain(batch()["input_ids"]).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["swl", "fsdp"])
def test_fully_sharded_data_parallel(mesh: Any, first: str) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, fused = build("llama"), build("llama")
    if first == "swl":
        swl.torch.apply_to(fused)
    for part in (*fused.model.layers, fused):
        fully_shard(part, mesh=mesh)
    if first == "fsdp":
        swl.torch.apply_to(fused)
    want, got = plain(**batch()), fused(**batch())
    assert isinstance(got.logits, LazyLogits)
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    torch.testing.assert_close([g.full_tensor() for g in gradients(fused)], gradients(plain), rtol=1e-4, atol=1e-6)


def test_a_head_that_is_sharded_by_itself_is_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = build("llama")
    swl.torch.apply_to(model)
    for part in (model.lm_head, model):
        fully_shard(part, mesh=mesh)
    with pytest.raises(RuntimeError, match="hold the head together with the rest"):
        model(**batch())
    sharded = build("llama")
    fully_shard(sharded.lm_head, mesh=mesh)
    with pytest.raises(ValueError, match="output embeddings of type FSDPLinear"):
        swl.torch.apply_to(sharded)


def test_a_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    examples = [{name: rows[i] for name, rows in batch(seed).items()} for seed in range(4) for i in range(2)]

    def losses(fused: bool) -> list[float]:
        model = build("qwen2")
        if fused:
            swl.torch.apply_to(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(fused)), max_steps=4, per_device_train_batch_size=2, logging_steps=1, seed=0,
            gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=examples, eval_dataset=examples,
            compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1)[:, :-1] == p.label_ids[:, 1:]).mean())},
        )  # fmt: skip
        trainer.train()
        steps = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        measured = trainer.evaluate()
        return [*steps, measured["eval_loss"], measured["eval_right"]]

    want = losses(fused=False)
    assert len(want) == 6
    assert losses(fused=True) == pytest.approx(want, rel=1e-6, abs=1e-6)


# ------------------------------------------------------------------------------------------------ what is done to a model


def test_it_can_be_undone() -> None:
    model = build("llama")
    before, hooks = dict(vars(model)), len(model._forward_hooks)
    applied = swl.torch.apply_to(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has the fused head already"):
        swl.torch.apply_to(model)
    applied.remove()
    applied.remove()
    assert (vars(model), len(model._forward_hooks)) == (before, hooks)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model(**batch()).logits) is Tensor
    with swl.torch.apply_to(model):
        assert isinstance(model(**batch()).logits, LazyLogits)
    assert type(model(**batch()).logits) is Tensor


def test_a_copy_has_a_head_of_its_own(tmp_path: Path) -> None:
    model = build("llama")
    swl.torch.apply_to(model)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model(**batch()).loss.item() == pytest.approx(torch.log(torch.tensor(96.0)).item())
    for other in (twin, loaded):
        same_loss(build("llama"), other, **batch())
    twin.save_pretrained(tmp_path)
    same_loss(build("llama"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path), **batch())


def test_what_is_no_such_model_is_named_with_what_it_lacks() -> None:
    model = build("llama")
    model.loss_function = torch.nn.functional.cross_entropy
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has <function cross_entropy .* as loss_function"):
        swl.torch.apply_to(model)
    bert = transformers.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for other, what in (
        (transformers.BertForMaskedLM(bert), "as loss_function|calls no loss_function"),
        (transformers.BertModel(bert), "has no output embeddings"),
        (transformers.AutoModelForSequenceClassification.from_config(CONFIGS["llama"]()), "has no output embeddings"),
        (torch.nn.ReLU(), "ReLU has no get_output_embeddings"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"model must be or hold a causal language model of transformers; .*({what})"
        ):
            swl.torch.apply_to(other)

    normed = build("llama")
    normed.lm_head.register_forward_hook(lambda head, args, logits: logits - logits.mean())
    swl.torch.apply_to(normed)
    assert type(normed(batch()["input_ids"]).logits) is Tensor
    with pytest.raises(RuntimeError, match="logits were computed before the loss"):
        normed(**batch())


# ------------------------------------------------------------------------------------------------ lazy logits


def test_lazy_logits_are_a_tensor_to_whoever_looks() -> None:
    model = build("phi")
    swl.torch.apply_to(model)
    lazy = model(**batch()).logits
    want = model(batch()["input_ids"]).logits
    assert (lazy.shape, lazy.dtype, lazy.device) == (want.shape, want.dtype, want.device)
    assert repr(lazy) == "LazyLogits(shape=(2, 17, 96), dtype=torch.float32, device='cpu')"
    for f in (
        lambda y: y[:, -1],
        lambda y: 2 * y.float() / 3.0,
        lambda y: (y / 3.0).tanh().tanh(),
        lambda y: y * torch.ones(96),
        lambda y: y / -2.0,
        lambda y: torch.softmax(y, dim=-1),
        lambda y: torch.cat([y, y]),
        lambda y: 1 - y,
        lambda y: y.detach().numpy(force=True).sum(),
        lambda y: y.argmax(-1),
        lambda y: len(y) + y.size(1) + y.ndim,
        lambda y: torch.stack(list(y)),
    ):
        torch.testing.assert_close(f(lazy) + 0, f(want), rtol=0, atol=0)


PEAK = """
import sys, torch, transformers, swl.torch

size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32_000, **size))
if sys.argv[1] == "fused":
    swl.torch.apply_to(model)
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
ids = torch.randint(0, 32_000, (1, 1024))
model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()
base = memory("VmRSS")
model(input_ids=ids, labels=ids).loss.backward()
print(memory("VmHWM") - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell how much memory was held")
def test_the_peak_of_memory_is_lower() -> None:
    def peak(head: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", PEAK, head]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert 0 < peak("fused") <= 0.75 * peak("plain")
