import os

import pandas as pd
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.utils.case_study import full_sort_topk

COLUMNS = {"customer_id": "user_id:token", "product_id": "item_id:token", "ordered_at": "timestamp:float"}
CONFIG = {
    "data_path": ".",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
    "valid_metric": "NDCG@10",
}

frame = pd.concat(pd.read_csv(f"{part}.csv", parse_dates=["ordered_at"]) for part in ("train", "test"))
frame["ordered_at"] = frame["ordered_at"].astype("int64")
os.makedirs("shop", exist_ok=True)
frame[list(COLUMNS)].rename(columns=COLUMNS).to_csv("shop/shop.inter", sep="\t", index=False)
run_recbole("Pop", "shop", config_dict=CONFIG)
saved = next(os.scandir("saved")).path
config, model, dataset, _, _, test = load_data_and_model(saved)
users = dataset.field2id_token["user_id"][1:]
scores, ids = full_sort_topk(dataset.token2id("user_id", users), model, test, k=10, device=config["device"])
lists = pd.DataFrame({"user_id": users.repeat(10), "item_id": dataset.id2token("item_id", ids.cpu()).ravel()})
lists.assign(rank=list(range(1, 11)) * len(users), score=scores.cpu().ravel()).to_csv("lists.csv", index=False)
