import json

import pandas as pd

names = pd.read_csv("products.csv").set_index("product_id")["name"]
train = pd.read_csv("train.csv").sort_values("ordered_at")
examples = []
for products in train.groupby("customer_id")["product_id"]:
    ordered = names[products[1]].tolist()
    for end in range(1, len(ordered)):
        instruction = "A customer of a shop has ordered these products. Name the next one.\n" + "\n".join(ordered[:end])
        examples.append({"instruction": instruction, "input": "", "output": ordered[end]})
with open("shop.json", "w") as file:
    json.dump(examples, file)
with open("dataset_info.json", "w") as file:
    json.dump({"shop": {"file_name": "shop.json"}}, file)
