"""Runs one GGUF folder in llama.cpp, in a process of its own: prompts as ids in, greedy ids out (JSON on stdout)."""

import json
import os
import sys
import urllib.request

import xllamacpp


def main():
    job = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.fit_params = False
    params.warmup = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if job.get("drafter"):
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.mparams.path = job["drafter"]
        params.speculative.draft.n_max = job["draft_tokens"]
    server = xllamacpp.Server(params)
    answers = []
    for prompt in job["prompts"]:
        body = {
            "prompt": prompt,
            "n_predict": job["count"],
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=120).read())
        answers.append({"tokens": answer["tokens"], "timings": answer["timings"]})
    print("ANSWERS " + json.dumps(answers), flush=True)
    os._exit(0)


main()
