import os

import pandas as pd
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.trainer import HyperTuning
from recbole.utils.case_study import full_sort_topk

COLUMNS = {"customer_id": "user_id:token", "product_id": "item_id:token", "ordered_at": "timestamp:float"}

frame = pd.concat(pd.read_csv(f"{part}.csv", parse_dates=["ordered_at"]) for part in ("train", "test"))
frame["ordered_at"] = frame["ordered_at"].astype("int64")
os.makedirs("shop", exist_ok=True)
frame[list(COLUMNS)].rename(columns=COLUMNS).to_csv("shop/shop.inter", sep="\t", index=False)
space = {"choice": {"reg_weight": [1, 3, 10, 30, 100, 300, 1000]}}
search = HyperTuning(objective_function, params_dict=space, fixed_config_file_list=["tuned.yaml"])
search.run()
run_recbole(config_file_list=["tuned.yaml"], config_dict=search.best_params)
saved = max(os.scandir("saved"), key=lambda file: file.stat().st_mtime).path
config, model, dataset, _, _, test = load_data_and_model(saved)
users = dataset.field2id_token["user_id"][1:]
scores, ids = full_sort_topk(dataset.token2id("user_id", users), model, test, k=10, device=config["device"])
lists = pd.DataFrame({"user_id": users.repeat(10), "item_id": dataset.id2token("item_id", ids.cpu()).ravel()})
lists.assign(rank=list(range(1, 11)) * len(users), score=scores.cpu().ravel()).to_csv("lists.csv", index=False)
