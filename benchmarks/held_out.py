"""What real.py measures of a student on held-out prompts, beside its teacher."""

import json
from types import SimpleNamespace

import torch

import evaluate
import harness
import logprobs
import masks
import rollout
import teachability
from harness.log import quarters, repeated_ngrams

TOP_K, MIN_SEGMENTS = 4, 2  # of the release rule, as train.py has them
PARTS = 4  # open prompts, reading them, sums, human solutions


class Ruler:
    """The teacher and the held-out prompts, and how a model is measured with them.

    args: pair (the folder), human, open_prompts, samples, solutions, max_new_tokens of real.py.
    A measurement is {name: [numerators, denominators]}, a number per prompt, sum or solution each.
    """

    def __init__(self, args):
        self.args, pair = args, args.pair
        self.teacher = self.open(pair / "teacher")
        self.tokenizer = harness.load_tokenizer(pair / "teacher")
        self.splitter = teachability.sentence_splitter()[0]
        self.how = {"pad_id": harness.pad_id(self.tokenizer), "decode": harness.fast_decode}
        self.stops = harness.stop_ids(self.teacher, self.tokenizer)
        problems = harness.load_problems(pair / "open.jsonl", require_answer=False)
        self.open_prompts = harness.render_prompts(self.tokenizer, problems[: args.open_prompts])
        self.sums = harness.load_problems(pair / "heldout.jsonl")
        self.human = []  # (ids, where the solution begins)
        for line in open(args.human).readlines()[: args.solutions] if args.human else ():
            texts, how = json.loads(line), {"return_dict": False}
            chat = [{"role": "user", "content": texts["question"]},
                    {"role": "assistant", "content": texts["answer"]}]  # fmt: skip
            asked = self.tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **how)
            whole = self.tokenizer.apply_chat_template(chat, **how)
            self.human.append((torch.tensor([whole]), len(asked)))

    @staticmethod
    def open(path):
        """A model in float32 that is only read."""
        model = harness.load_model(path, dtype=torch.float32, device="cpu")
        return model.eval().requires_grad_(False)

    def write(self, model, prompts, seed: int, samples: int):
        """Responses at temperature 1, `samples` to each prompt."""
        return rollout.generate(
            model, [prompt for prompt in prompts for _ in range(samples)], batch_size=48,
            max_new_tokens=self.args.max_new_tokens, eos_ids=self.stops, top_k=TOP_K,
            generator=torch.Generator().manual_seed(seed), **self.how,
        )  # fmt: skip

    @torch.no_grad()
    def measure(self, model, moved=lambda: None) -> dict:
        """Everything about a model: of the teacher, KL to itself is 0 and left out. moved: called
        after each of the PARTS of the work."""
        batch = self.write(model, self.open_prompts, 1, self.args.samples)
        moved()
        found = self.along(batch, self.read(model, batch), model is not self.teacher)
        moved()
        prompts = harness.render_prompts(self.tokenizer, self.sums)
        records = evaluate.sample_answers(
            model, self.tokenizer, self.sums, prompts, samples=2 * self.args.samples,
            max_new_tokens=32, stop_ids=self.stops, progress=False,
            generator=torch.Generator().manual_seed(2), **self.how,
        )  # fmt: skip
        right = [sum(record["correct"] for record in x) for x in records]
        found["accuracy"] = [right, [len(x) for x in records]]
        moved()
        nll = []
        for ids_1T, start in self.human:
            mask_1T = torch.arange(ids_1T.shape[1])[None] >= start
            hidden_1TD = model.base_model(input_ids=ids_1T, use_cache=False)[0]
            head_VD = model.get_output_embeddings().weight
            logp_1T = logprobs.token_logprobs(hidden_1TD, head_VD, ids_1T, mask_BT=mask_1T)
            nll.append((-logp_1T.sum().item(), int(mask_1T.sum())))
        moved()
        return found | ({"perplexity": [list(x) for x in zip(*nll, strict=True)]} if nll else {})

    def read(self, model, batch) -> SimpleNamespace:
        """What both models say of the tokens: exact KL both ways, the teacher's numbers."""
        mask_BT = batch.response_mask_BT
        said = SimpleNamespace(rkl=torch.zeros(mask_BT.shape), fkl=torch.zeros(mask_BT.shape),
                               max_prob=torch.zeros(mask_BT.shape),
                               candidates=torch.zeros(batch.topk_ids_BTK.shape))  # fmt: skip
        own_VD, head_VD = (m.get_output_embeddings().weight for m in (model, self.teacher))
        for rows in torch.arange(len(mask_BT)).split(8):
            ids_BT, how = batch.ids_BT[rows], {"mask_BT": mask_BT[rows]}
            teacher_BTD = self.teacher.base_model(input_ids=ids_BT, use_cache=False)[0]
            stats = logprobs.token_stats(
                teacher_BTD,
                head_VD,
                ids_BT,
                entropy=False,
                candidates_BTK=batch.topk_ids_BTK[rows],
                **how,
            )
            said.max_prob[rows] = stats.max_prob_BT
            said.candidates[rows] = stats.candidate_logp_BTK
            if model is not self.teacher:
                pair = model.base_model(input_ids=ids_BT, use_cache=False)[0], own_VD
                pair += teacher_BTD, head_VD
                for kind in ("rkl", "fkl"):
                    kl_BT = logprobs.token_divergence(*pair, kind=kind, **how)
                    getattr(said, kind)[rows] = kl_BT
        return said

    def along(self, batch, said, has_kl: bool) -> dict:
        """The numbers of responses, summed by prompt."""
        mask_BT, found = batch.response_mask_BT, {}
        ones_B, length_B = torch.ones(len(mask_BT)), mask_BT.sum(dim=1)

        def put(name, value_B, count_B=ones_B):
            pair = (x.double().view(-1, self.args.samples).sum(dim=1) for x in (value_B, count_B))
            found[name] = [x_P.tolist() for x_P in pair]

        def put_tokens(name, value_BT, where_BT):
            put(name, torch.where(where_BT, value_BT, 0).sum(dim=1), where_BT.sum(dim=1))

        band_BT = 4 * (mask_BT.cumsum(dim=1) - 1) // self.args.max_new_tokens
        for name, kl_BT in (("reverse_kl", said.rkl), ("forward_kl", said.fkl)) * has_kl:
            put_tokens(name, kl_BT, mask_BT)
            for band in range(4):
                put_tokens(f"{name}_{band}", kl_BT, mask_BT & (band_BT == band))
        for quarter in range(4):
            put_tokens(f"fidelity_{quarter}", said.max_prob, quarters(mask_BT) == quarter)
        put_tokens("entropy", batch.entropy_BT, mask_BT)
        put("tokens", length_B)
        put("truncated", batch.truncated_B)

        rows = [ids_T[own_T] for ids_T, own_T in zip(batch.ids_BT, mask_BT, strict=True)]
        put("repeated", *torch.tensor([repeated_ngrams(ids_T) for ids_T in rows]).unbind(1))
        segments = [teachability.token_segments(self.tokenizer, ids_T.tolist(), self.splitter)
                    for ids_T in rows]  # fmt: skip
        put("sentences", torch.tensor([len(segment_T.unique()) for segment_T in segments]))
        rule = masks.release(mask_BT, said.candidates, segments, min_segments=MIN_SEGMENTS)
        fired_B, kept_B = rule.released_B, rule.keep_BT.sum(dim=1)
        last = [int(s[k - 1]) + 1 for s, k in zip(segments, kept_B.tolist(), strict=True)]
        put("fired", fired_B)
        put("clear", rule.gain_B > 6)
        for name, value_B in (("at", kept_B / length_B), ("segment", torch.tensor(last)),
                              ("gain", rule.gain_B)):  # fmt: skip
            put(name, torch.where(fired_B, value_B, 0), fired_B)
        return found
