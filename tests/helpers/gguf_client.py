"""Runs a GGUF folder in llama.cpp, in a process of its own: a job (JSON) in, greedy ids out (JSON on stdout)."""

import base64
import json
import os
import sys
import urllib.request
from pathlib import Path

import xllamacpp


def serve(job):
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # several wait in busy loops
    params.fit_params = False
    params.warmup = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if job.get("drafter"):
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.mparams.path = job["drafter"]
        params.speculative.draft.n_max = job["draft_tokens"]
    if job.get("mmproj"):
        params.mmproj.path = job["mmproj"]
    return xllamacpp.Server(params)


def fetch(address, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())


def main():
    job = json.loads(sys.argv[1])
    server = serve(job)  # it stops when nothing holds it
    address = server.listening_address
    answers = []
    for prompt in job["prompts"]:
        if isinstance(prompt, dict):  # {"file": …, "text": …}: a medium, then text
            medium = base64.b64encode(Path(prompt["file"]).read_bytes()).decode()
            marker = fetch(f"{address}/props")["media_marker"]
            prompt = {"prompt_string": marker + prompt["text"], "multimodal_data": [medium]}
        body = {"prompt": prompt, "n_predict": job["count"], "temperature": 0, "ignore_eos": True}
        answers.append(fetch(f"{address}/completion", {**body, "return_tokens": True, "cache_prompt": False}))
    print("ANSWERS " + json.dumps(answers), flush=True)
    os._exit(0)


main()
