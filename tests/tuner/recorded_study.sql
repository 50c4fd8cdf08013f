-- Written by `sqlite3.Connection.iterdump` from a study file of version 0.1.0 as it was on 2026-11-30: `recorded` is a
-- run of the demo, `endings` one whose driver was killed while a trial ran.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE lora_batch_tuner_leases (
	study VARCHAR(512) NOT NULL, 
	token VARCHAR(32) NOT NULL, 
	holder TEXT NOT NULL, 
	heartbeat FLOAT NOT NULL, 
	PRIMARY KEY (study)
);
INSERT INTO "lora_batch_tuner_leases" VALUES('endings','dde273dc921942f2ae4f615854cad0ce','{"user": "somebody", "host": {"name": "elsewhere", "boot": "d2777dba-c6ef-42e2-9518-9b553fbb437a", "processes": "pid:[4026531836]"}, "pid": 9092, "started": 2330538, "since": 1796056531.6045322}',1.79605653160667538643e+09);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'recorded');
INSERT INTO "studies" VALUES(2,'endings');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
INSERT INTO "study_directions" VALUES(2,'MINIMIZE',1,1);
INSERT INTO "study_directions" VALUES(3,'MAXIMIZE',2,0);
INSERT INTO "study_directions" VALUES(4,'MINIMIZE',2,1);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["samples_per_second", "validation_loss"]');
INSERT INTO "study_system_attributes" VALUES(2,2,'study:metric_names','["samples_per_second", "validation_loss"]');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'fingerprint','"{\"cluster.device\": \"cpu\", \"cluster.memory_budget\": 209715200, \"data.image\": null, \"data.max_length\": 512, \"data.max_validation_samples\": 64, \"data.messages\": null, \"data.prompt\": \"prompt\", \"data.response\": \"response\", \"data.text\": null, \"data.train\": null, \"data.validation\": null, \"global_batch_size\": 16, \"lora.alpha\": 16.0, \"lora.dropout\": 0.0, \"lora.r\": 8, \"lora.target_modules\": \"all-linear\", \"model\": null, \"num_workers\": 2, \"optimizer.learning_rate\": 0.005, \"optimizer.max_grad_norm\": 1.0, \"optimizer.weight_decay\": 0.0, \"trial.batching\": \"balanced\", \"trial.seed\": 0, \"trial.steps\": 6, \"trial.warmup_steps\": 1}"');
INSERT INTO "study_user_attributes" VALUES(2,1,'global_batch_size','16');
INSERT INTO "study_user_attributes" VALUES(3,1,'num_workers','2');
INSERT INTO "study_user_attributes" VALUES(4,1,'cluster.device','"cpu"');
INSERT INTO "study_user_attributes" VALUES(5,1,'cluster.memory_budget','209715200');
INSERT INTO "study_user_attributes" VALUES(6,1,'data.prompt','"prompt"');
INSERT INTO "study_user_attributes" VALUES(7,1,'data.response','"response"');
INSERT INTO "study_user_attributes" VALUES(8,1,'data.max_length','512');
INSERT INTO "study_user_attributes" VALUES(9,1,'data.max_validation_samples','64');
INSERT INTO "study_user_attributes" VALUES(10,1,'lora.r','8');
INSERT INTO "study_user_attributes" VALUES(11,1,'lora.alpha','16.0');
INSERT INTO "study_user_attributes" VALUES(12,1,'lora.dropout','0.0');
INSERT INTO "study_user_attributes" VALUES(13,1,'lora.target_modules','"all-linear"');
INSERT INTO "study_user_attributes" VALUES(14,1,'optimizer.learning_rate','0.005');
INSERT INTO "study_user_attributes" VALUES(15,1,'optimizer.weight_decay','0.0');
INSERT INTO "study_user_attributes" VALUES(16,1,'optimizer.max_grad_norm','1.0');
INSERT INTO "study_user_attributes" VALUES(17,1,'trial.steps','6');
INSERT INTO "study_user_attributes" VALUES(18,1,'trial.warmup_steps','1');
INSERT INTO "study_user_attributes" VALUES(19,1,'trial.seed','0');
INSERT INTO "study_user_attributes" VALUES(20,1,'trial.batching','"balanced"');
INSERT INTO "study_user_attributes" VALUES(21,1,'identity','"{\"versions.accelerate\": \"1.15.0\", \"versions.datasets\": \"5.2.0\", \"versions.lora-batch-tuner\": \"0.1.0\", \"versions.optuna\": \"5.0.0\", \"versions.peft\": \"0.21.2\", \"versions.ray\": \"2.60.0\", \"versions.torch\": \"2.13.0+cpu\", \"versions.transformers\": \"5.23.0\"}"');
INSERT INTO "study_user_attributes" VALUES(22,1,'last_generation','"\"recorded\""');
INSERT INTO "study_user_attributes" VALUES(23,1,'knobs','"{}"');
INSERT INTO "study_user_attributes" VALUES(24,2,'fingerprint','"{\"global_batch_size\": 32, \"num_workers\": 2}"');
INSERT INTO "study_user_attributes" VALUES(25,2,'global_batch_size','32');
INSERT INTO "study_user_attributes" VALUES(26,2,'num_workers','2');
INSERT INTO "study_user_attributes" VALUES(27,2,'identity','"{\"versions.torch\": \"2.13.0\"}"');
INSERT INTO "study_user_attributes" VALUES(28,2,'last_generation','"\"endings\""');
INSERT INTO "study_user_attributes" VALUES(29,2,'knobs','"{\"attn_implementation\": [\"sdpa\", \"eager\"]}"');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'per_device_train_batch_size',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(2,1,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(3,1,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(4,2,'per_device_train_batch_size',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(5,2,'precision',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(6,2,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(7,3,'per_device_train_batch_size',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(8,3,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(9,3,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(10,4,'per_device_train_batch_size',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(11,4,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(12,4,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(13,5,'per_device_train_batch_size',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(14,5,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(15,5,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(16,5,'attn_implementation',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(17,6,'per_device_train_batch_size',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(18,6,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(19,6,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(20,6,'attn_implementation',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(21,7,'per_device_train_batch_size',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(22,7,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(23,7,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(24,7,'attn_implementation',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(25,8,'per_device_train_batch_size',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(26,8,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(27,8,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(28,8,'attn_implementation',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(29,9,'per_device_train_batch_size',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(30,9,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(31,9,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(32,9,'attn_implementation',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(33,10,'per_device_train_batch_size',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(34,10,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(35,10,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(36,10,'attn_implementation',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(37,11,'per_device_train_batch_size',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(38,11,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(39,11,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(40,11,'attn_implementation',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
INSERT INTO "trial_params" VALUES(41,12,'per_device_train_batch_size',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 4, 8, 16]}}');
INSERT INTO "trial_params" VALUES(42,12,'precision',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["fp32", "tf32", "bf16", "fp16", "nf4"]}}');
INSERT INTO "trial_params" VALUES(43,12,'gradient_checkpointing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(44,12,'attn_implementation',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["sdpa", "eager"]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'constraints','[-0.9142657089233398]');
INSERT INTO "trial_system_attributes" VALUES(2,1,'constraints:memory','-0.9142657089233398');
INSERT INTO "trial_system_attributes" VALUES(3,2,'constraints','[-0.6514585113525391]');
INSERT INTO "trial_system_attributes" VALUES(4,2,'constraints:memory','-0.6514585113525391');
INSERT INTO "trial_system_attributes" VALUES(5,3,'constraints','[-0.4415448760986328]');
INSERT INTO "trial_system_attributes" VALUES(6,3,'constraints:memory','-0.4415448760986328');
INSERT INTO "trial_system_attributes" VALUES(7,4,'constraints','[-0.4415448760986328]');
INSERT INTO "trial_system_attributes" VALUES(8,4,'constraints:memory','-0.4415448760986328');
INSERT INTO "trial_system_attributes" VALUES(9,5,'constraints','[-0.49]');
INSERT INTO "trial_system_attributes" VALUES(10,5,'constraints:memory','-0.49');
INSERT INTO "trial_system_attributes" VALUES(11,6,'constraints','[-0.49]');
INSERT INTO "trial_system_attributes" VALUES(12,6,'constraints:memory','-0.49');
INSERT INTO "trial_system_attributes" VALUES(13,7,'constraints','[1000000000.0]');
INSERT INTO "trial_system_attributes" VALUES(14,7,'constraints:memory','Infinity');
INSERT INTO "trial_system_attributes" VALUES(15,8,'constraints','[1.0]');
INSERT INTO "trial_system_attributes" VALUES(16,8,'constraints:finite','1.0');
INSERT INTO "trial_system_attributes" VALUES(17,11,'constraints','[-0.2]');
INSERT INTO "trial_system_attributes" VALUES(18,11,'constraints:memory','-0.2');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'gradient_accumulation_steps','8');
INSERT INTO "trial_user_attributes" VALUES(2,1,'global_batch_size','16');
INSERT INTO "trial_user_attributes" VALUES(3,1,'setting','"1x8 fp32"');
INSERT INTO "trial_user_attributes" VALUES(4,1,'status','"complete"');
INSERT INTO "trial_user_attributes" VALUES(5,1,'samples_per_second','112.8847337844593');
INSERT INTO "trial_user_attributes" VALUES(6,1,'samples_per_second_ci95','[105.31734662717169, 121.62379095979789]');
INSERT INTO "trial_user_attributes" VALUES(7,1,'validation_loss','5.8472096649035485');
INSERT INTO "trial_user_attributes" VALUES(8,1,'validation_loss_source','"measured"');
INSERT INTO "trial_user_attributes" VALUES(9,1,'train_loss','[7.673641204833984, 7.2438554763793945, 6.944760799407959, 6.733992576599121, 6.372591972351074, 6.114181995391846]');
INSERT INTO "trial_user_attributes" VALUES(10,1,'tokens_per_step','734.3772579597141');
INSERT INTO "trial_user_attributes" VALUES(11,1,'memory_points','[{"per_device_train_batch_size": 1, "tokens": 369, "peak_bytes": 17979784, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}, {"per_device_train_batch_size": 2, "tokens": 736, "peak_bytes": 32205776, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}, {"per_device_train_batch_size": 4, "tokens": 1466, "peak_bytes": 60530560, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}, {"per_device_train_batch_size": 8, "tokens": 2924, "peak_bytes": 117116528, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}, {"per_device_train_batch_size": 1, "tokens": 369, "peak_bytes": 7952884, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "precision": "fp32", "gradient_checkpointing": true, "knobs": {}}}, {"per_device_train_batch_size": 2, "tokens": 736, "peak_bytes": 12192468, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "precision": "fp32", "gradient_checkpointing": true, "knobs": {}}}, {"per_device_train_batch_size": 4, "tokens": 1466, "peak_bytes": 20625428, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "precision": "fp32", "gradient_checkpointing": true, "knobs": {}}}, {"per_device_train_batch_size": 8, "tokens": 2924, "peak_bytes": 37468244, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "precision": "fp32", "gradient_checkpointing": true, "knobs": {}}}]');
INSERT INTO "trial_user_attributes" VALUES(12,1,'step_seconds','[0.14890397700219182, 0.14649213499797042, 0.13580552900020848, 0.13823491600123816, 0.13925094500154955]');
INSERT INTO "trial_user_attributes" VALUES(13,1,'peak_memory_bytes','[17979784, 17979784]');
INSERT INTO "trial_user_attributes" VALUES(14,1,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(15,1,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(16,1,'constraints','{"memory": -0.9142657089233398}');
INSERT INTO "trial_user_attributes" VALUES(17,1,'seconds','{"setup": 0.07054776200311608, "probe": 2.832013270999596, "warmup": 0.15539400200214004, "reduce": 0.014999149003415368, "train": 0.8663056649966165, "validate": 0.28076830400095787, "release": 0.006386791999830166, "total": 20.76449042400054}');
INSERT INTO "trial_user_attributes" VALUES(18,1,'notes','["samples/s is known to 7.7% after 5 timed steps; use 10 or more (trial.steps)"]');
INSERT INTO "trial_user_attributes" VALUES(19,1,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(20,1,'outcome','"112.9 +-8.2 samples/s, validation loss 5.8472, 17.1 MiB"');
INSERT INTO "trial_user_attributes" VALUES(21,1,'memory','"17.1 MiB of 200 MiB (9%)"');
INSERT INTO "trial_user_attributes" VALUES(22,2,'gradient_accumulation_steps','1');
INSERT INTO "trial_user_attributes" VALUES(23,2,'global_batch_size','16');
INSERT INTO "trial_user_attributes" VALUES(24,2,'setting','"8x1 bf16"');
INSERT INTO "trial_user_attributes" VALUES(25,2,'status','"complete"');
INSERT INTO "trial_user_attributes" VALUES(26,2,'samples_per_second','133.69303131337088');
INSERT INTO "trial_user_attributes" VALUES(27,2,'samples_per_second_ci95','[113.23829794612028, 163.1665196513827]');
INSERT INTO "trial_user_attributes" VALUES(28,2,'validation_loss','5.847326516755002');
INSERT INTO "trial_user_attributes" VALUES(29,2,'validation_loss_source','"measured"');
INSERT INTO "trial_user_attributes" VALUES(30,2,'train_loss','[7.671710014343262, 7.241891860961914, 6.945704460144043, 6.732548713684082, 6.3715386390686035, 6.112682342529297]');
INSERT INTO "trial_user_attributes" VALUES(31,2,'tokens_per_step','734.3772579597141');
INSERT INTO "trial_user_attributes" VALUES(32,2,'memory_points','[{"per_device_train_batch_size": 1, "tokens": 369, "peak_bytes": 11317992, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}, {"per_device_train_batch_size": 8, "tokens": 2924, "peak_bytes": 73094448, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}, {"per_device_train_batch_size": 1, "tokens": 369, "peak_bytes": 5785812, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "precision": "bf16", "gradient_checkpointing": true, "knobs": {}}}, {"per_device_train_batch_size": 2, "tokens": 736, "peak_bytes": 9256848, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "precision": "bf16", "gradient_checkpointing": true, "knobs": {}}}, {"per_device_train_batch_size": 4, "tokens": 1466, "peak_bytes": 16193784, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "precision": "bf16", "gradient_checkpointing": true, "knobs": {}}}, {"per_device_train_batch_size": 8, "tokens": 2924, "peak_bytes": 30065088, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "precision": "bf16", "gradient_checkpointing": true, "knobs": {}}}]');
INSERT INTO "trial_user_attributes" VALUES(33,2,'step_seconds','[0.12369082800069009, 0.1265376949995698, 0.10987084900261834, 0.11542116500277189, 0.12286517699976685]');
INSERT INTO "trial_user_attributes" VALUES(34,2,'peak_memory_bytes','[73094448, 73094448]');
INSERT INTO "trial_user_attributes" VALUES(35,2,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(36,2,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(37,2,'constraints','{"memory": -0.6514585113525391}');
INSERT INTO "trial_user_attributes" VALUES(38,2,'seconds','{"setup": 0.1131152710004244, "probe": 2.140846848000365, "warmup": 1.2502761719988484, "reduce": 0.056794680007442366, "train": 1.854043974999513, "validate": 0.17619371299952036, "release": 0.00617252500160248, "total": 4.322832740999729}');
INSERT INTO "trial_user_attributes" VALUES(39,2,'notes','["samples/s is known to 22.0% after 5 timed steps; use 10 or more (trial.steps)"]');
INSERT INTO "trial_user_attributes" VALUES(40,2,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(41,2,'outcome','"133.7 +-25.0 samples/s, validation loss 5.8473, 69.7 MiB"');
INSERT INTO "trial_user_attributes" VALUES(42,2,'memory','"69.7 MiB of 200 MiB (35%)"');
INSERT INTO "trial_user_attributes" VALUES(43,3,'gradient_accumulation_steps','1');
INSERT INTO "trial_user_attributes" VALUES(44,3,'global_batch_size','16');
INSERT INTO "trial_user_attributes" VALUES(45,3,'setting','"8x1 fp32"');
INSERT INTO "trial_user_attributes" VALUES(46,3,'status','"complete"');
INSERT INTO "trial_user_attributes" VALUES(47,3,'samples_per_second','205.7345248207212');
INSERT INTO "trial_user_attributes" VALUES(48,3,'samples_per_second_ci95','[141.73616016788392, 375.1073897691004]');
INSERT INTO "trial_user_attributes" VALUES(49,3,'validation_loss','5.8472096649035485');
INSERT INTO "trial_user_attributes" VALUES(50,3,'validation_loss_source','"same steps as trial 0"');
INSERT INTO "trial_user_attributes" VALUES(51,3,'train_loss','[7.673640251159668, 7.243855953216553, 6.944761276245117, 6.733992576599121, 6.372591018676758, 6.114181995391846]');
INSERT INTO "trial_user_attributes" VALUES(52,3,'tokens_per_step','734.3772579597141');
INSERT INTO "trial_user_attributes" VALUES(53,3,'memory_points','[{"per_device_train_batch_size": 8, "tokens": 2924, "peak_bytes": 117116528, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}]');
INSERT INTO "trial_user_attributes" VALUES(54,3,'step_seconds','[0.10775618399929954, 0.06623594999837223, 0.05669946099806111, 0.061726074000034714, 0.09643296300055226]');
INSERT INTO "trial_user_attributes" VALUES(55,3,'peak_memory_bytes','[117116528, 117116528]');
INSERT INTO "trial_user_attributes" VALUES(56,3,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(57,3,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(58,3,'constraints','{"memory": -0.4415448760986328}');
INSERT INTO "trial_user_attributes" VALUES(59,3,'seconds','{"setup": 0.08587472700310173, "probe": 0.9704937120004615, "warmup": 0.10220602499975939, "reduce": 0.017940665999049088, "train": 0.5021399370016297, "validate": 1.136699938797392e-05, "release": 0.0077899649986648, "total": 1.6034688689978793}');
INSERT INTO "trial_user_attributes" VALUES(60,3,'notes','["samples/s is known to 82.3% after 5 timed steps; use 10 or more (trial.steps)"]');
INSERT INTO "trial_user_attributes" VALUES(61,3,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(62,3,'outcome','"205.7 +-116.7 samples/s, validation loss 5.8472, 112 MiB"');
INSERT INTO "trial_user_attributes" VALUES(63,3,'memory','"112 MiB of 200 MiB (56%)"');
INSERT INTO "trial_user_attributes" VALUES(64,4,'gradient_accumulation_steps','1');
INSERT INTO "trial_user_attributes" VALUES(65,4,'global_batch_size','16');
INSERT INTO "trial_user_attributes" VALUES(66,4,'setting','"8x1 fp32"');
INSERT INTO "trial_user_attributes" VALUES(67,4,'status','"complete"');
INSERT INTO "trial_user_attributes" VALUES(68,4,'samples_per_second','215.26530847840635');
INSERT INTO "trial_user_attributes" VALUES(69,4,'samples_per_second_ci95','[151.64668593882422, 370.8393592654007]');
INSERT INTO "trial_user_attributes" VALUES(70,4,'validation_loss','5.847209340010095');
INSERT INTO "trial_user_attributes" VALUES(71,4,'validation_loss_source','"measured"');
INSERT INTO "trial_user_attributes" VALUES(72,4,'train_loss','[7.673640251159668, 7.243855953216553, 6.944761276245117, 6.733992576599121, 6.372591018676758, 6.114181995391846]');
INSERT INTO "trial_user_attributes" VALUES(73,4,'tokens_per_step','734.3772579597141');
INSERT INTO "trial_user_attributes" VALUES(74,4,'memory_points','[{"per_device_train_batch_size": 8, "tokens": 2924, "peak_bytes": 117116528, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}]');
INSERT INTO "trial_user_attributes" VALUES(75,4,'step_seconds','[0.09630880899931071, 0.0806254839990288, 0.06627093800125294, 0.06101173299975926, 0.06741746500119916]');
INSERT INTO "trial_user_attributes" VALUES(76,4,'peak_memory_bytes','[117116528, 117116528]');
INSERT INTO "trial_user_attributes" VALUES(77,4,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(78,4,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(79,4,'constraints','{"memory": -0.4415448760986328}');
INSERT INTO "trial_user_attributes" VALUES(80,4,'seconds','{"setup": 0.0519501400012814, "probe": 0.7211044010000478, "warmup": 0.106804059996648, "reduce": 0.014614287989388686, "train": 0.4871968959996593, "validate": 0.1369537240025238, "release": 0.004758634997415356, "total": 1.431671438000194}');
INSERT INTO "trial_user_attributes" VALUES(81,4,'notes','["samples/s is known to 72.3% after 5 timed steps; use 10 or more (trial.steps)"]');
INSERT INTO "trial_user_attributes" VALUES(82,4,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(83,4,'outcome','"215.3 +-109.6 samples/s, validation loss 5.8472, 112 MiB"');
INSERT INTO "trial_user_attributes" VALUES(84,4,'memory','"112 MiB of 200 MiB (56%)"');
INSERT INTO "trial_user_attributes" VALUES(85,5,'gradient_accumulation_steps','16');
INSERT INTO "trial_user_attributes" VALUES(86,5,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(87,5,'setting','"1x16 fp32 attn_implementation=sdpa"');
INSERT INTO "trial_user_attributes" VALUES(88,5,'status','"complete"');
INSERT INTO "trial_user_attributes" VALUES(89,5,'samples_per_second','7.5');
INSERT INTO "trial_user_attributes" VALUES(90,5,'samples_per_second_ci95','[7.425, 7.575]');
INSERT INTO "trial_user_attributes" VALUES(91,5,'validation_loss','2.25');
INSERT INTO "trial_user_attributes" VALUES(92,5,'validation_loss_source','"measured"');
INSERT INTO "trial_user_attributes" VALUES(93,5,'train_loss','[2.5, 2.4, 2.35]');
INSERT INTO "trial_user_attributes" VALUES(94,5,'tokens_per_step','4000.0');
INSERT INTO "trial_user_attributes" VALUES(95,5,'memory_points','[{"per_device_train_batch_size": 1, "tokens": 300, "peak_bytes": 104857600, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}]');
INSERT INTO "trial_user_attributes" VALUES(96,5,'step_seconds','[4.1, 4.0, 4.05, 4.02]');
INSERT INTO "trial_user_attributes" VALUES(97,5,'peak_memory_bytes','[104857600, 105906176]');
INSERT INTO "trial_user_attributes" VALUES(98,5,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(99,5,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(100,5,'constraints','{"memory": -0.49}');
INSERT INTO "trial_user_attributes" VALUES(101,5,'seconds','{"total": 9.5, "setup": 0.2, "train": 8.0}');
INSERT INTO "trial_user_attributes" VALUES(102,5,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(103,5,'outcome','"7.50 +-0.08 samples/s, validation loss 2.2500, 101 MiB"');
INSERT INTO "trial_user_attributes" VALUES(104,5,'memory','"101 MiB of 200 MiB (50%)"');
INSERT INTO "trial_user_attributes" VALUES(105,6,'gradient_accumulation_steps','8');
INSERT INTO "trial_user_attributes" VALUES(106,6,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(107,6,'setting','"2x8 fp32 attn_implementation=sdpa"');
INSERT INTO "trial_user_attributes" VALUES(108,6,'status','"complete"');
INSERT INTO "trial_user_attributes" VALUES(109,6,'samples_per_second','7.9');
INSERT INTO "trial_user_attributes" VALUES(110,6,'samples_per_second_ci95','[7.821000000000001, 7.979]');
INSERT INTO "trial_user_attributes" VALUES(111,6,'validation_loss','2.26');
INSERT INTO "trial_user_attributes" VALUES(112,6,'validation_loss_source','"measured"');
INSERT INTO "trial_user_attributes" VALUES(113,6,'train_loss','[2.5, 2.4, 2.35]');
INSERT INTO "trial_user_attributes" VALUES(114,6,'tokens_per_step','4000.0');
INSERT INTO "trial_user_attributes" VALUES(115,6,'memory_points','[{"per_device_train_batch_size": 1, "tokens": 300, "peak_bytes": 104857600, "needed_bytes": null, "peak_reserved_bytes": null, "sibling": null}]');
INSERT INTO "trial_user_attributes" VALUES(116,6,'step_seconds','[4.1, 4.0, 4.05, 4.02]');
INSERT INTO "trial_user_attributes" VALUES(117,6,'peak_memory_bytes','[104857600, 105906176]');
INSERT INTO "trial_user_attributes" VALUES(118,6,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(119,6,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(120,6,'constraints','{"memory": -0.49}');
INSERT INTO "trial_user_attributes" VALUES(121,6,'seconds','{"total": 9.5, "setup": 0.2, "train": 8.0}');
INSERT INTO "trial_user_attributes" VALUES(122,6,'notes','["samples/s is known to 1%"]');
INSERT INTO "trial_user_attributes" VALUES(123,6,'disturbed','["another process used 3 of 2 cores"]');
INSERT INTO "trial_user_attributes" VALUES(124,6,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(125,6,'outcome','"7.90 +-0.08 samples/s, validation loss 2.2600, 101 MiB, disturbed"');
INSERT INTO "trial_user_attributes" VALUES(126,6,'memory','"101 MiB of 200 MiB (50%)"');
INSERT INTO "trial_user_attributes" VALUES(127,7,'gradient_accumulation_steps','4');
INSERT INTO "trial_user_attributes" VALUES(128,7,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(129,7,'setting','"4x4 fp32 attn_implementation=sdpa"');
INSERT INTO "trial_user_attributes" VALUES(130,7,'status','"infeasible"');
INSERT INTO "trial_user_attributes" VALUES(131,7,'reason','"oom"');
INSERT INTO "trial_user_attributes" VALUES(132,7,'detail','"tried to allocate 90 bytes"');
INSERT INTO "trial_user_attributes" VALUES(133,7,'memory_budget_bytes','209715200');
INSERT INTO "trial_user_attributes" VALUES(134,7,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(135,7,'constraints','{"memory": Infinity}');
INSERT INTO "trial_user_attributes" VALUES(136,7,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(137,7,'outcome','"infeasible (oom)"');
INSERT INTO "trial_user_attributes" VALUES(138,8,'gradient_accumulation_steps','16');
INSERT INTO "trial_user_attributes" VALUES(139,8,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(140,8,'setting','"1x16 fp32 attn_implementation=eager"');
INSERT INTO "trial_user_attributes" VALUES(141,8,'status','"infeasible"');
INSERT INTO "trial_user_attributes" VALUES(142,8,'reason','"diverged"');
INSERT INTO "trial_user_attributes" VALUES(143,8,'train_loss','[2.5, Infinity, NaN]');
INSERT INTO "trial_user_attributes" VALUES(144,8,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(145,8,'constraints','{"finite": 1.0}');
INSERT INTO "trial_user_attributes" VALUES(146,8,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(147,8,'outcome','"infeasible (diverged)"');
INSERT INTO "trial_user_attributes" VALUES(148,9,'gradient_accumulation_steps','8');
INSERT INTO "trial_user_attributes" VALUES(149,9,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(150,9,'setting','"2x8 fp32 attn_implementation=eager"');
INSERT INTO "trial_user_attributes" VALUES(151,9,'status','"failed"');
INSERT INTO "trial_user_attributes" VALUES(152,9,'reason','"worker-died"');
INSERT INTO "trial_user_attributes" VALUES(153,9,'detail','"rank 1 was killed"');
INSERT INTO "trial_user_attributes" VALUES(154,9,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(155,9,'lane','0');
INSERT INTO "trial_user_attributes" VALUES(156,9,'outcome','"failed (worker-died)"');
INSERT INTO "trial_user_attributes" VALUES(157,10,'gradient_accumulation_steps','4');
INSERT INTO "trial_user_attributes" VALUES(158,10,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(159,10,'setting','"4x4 fp32 attn_implementation=eager"');
INSERT INTO "trial_user_attributes" VALUES(160,10,'status','"failed"');
INSERT INTO "trial_user_attributes" VALUES(161,10,'reason','"interrupted"');
INSERT INTO "trial_user_attributes" VALUES(162,10,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(163,10,'outcome','"failed (interrupted)"');
INSERT INTO "trial_user_attributes" VALUES(164,11,'gradient_accumulation_steps','4');
INSERT INTO "trial_user_attributes" VALUES(165,11,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(166,11,'setting','"4x4 fp32 attn_implementation=eager"');
INSERT INTO "trial_user_attributes" VALUES(167,11,'status','"pruned"');
INSERT INTO "trial_user_attributes" VALUES(168,11,'reason','"slower"');
INSERT INTO "trial_user_attributes" VALUES(169,11,'samples_per_second','3.0');
INSERT INTO "trial_user_attributes" VALUES(170,11,'samples_per_second_ci95','[2.9, 3.1]');
INSERT INTO "trial_user_attributes" VALUES(171,11,'alloc_retries','0');
INSERT INTO "trial_user_attributes" VALUES(172,11,'constraints','{"memory": -0.2}');
INSERT INTO "trial_user_attributes" VALUES(173,11,'lane','1');
INSERT INTO "trial_user_attributes" VALUES(174,11,'outcome','"3.00 +-0.10 samples/s, pruned (slower)"');
INSERT INTO "trial_user_attributes" VALUES(175,12,'gradient_accumulation_steps','2');
INSERT INTO "trial_user_attributes" VALUES(176,12,'global_batch_size','32');
INSERT INTO "trial_user_attributes" VALUES(177,12,'setting','"8x2 fp32 attn_implementation=eager"');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,1.12884733784459299953e+02,'FINITE');
INSERT INTO "trial_values" VALUES(2,1,1,5.84720966490354854272e+00,'FINITE');
INSERT INTO "trial_values" VALUES(3,2,0,1.33693031313370880753e+02,'FINITE');
INSERT INTO "trial_values" VALUES(4,2,1,5.84732651675500214594e+00,'FINITE');
INSERT INTO "trial_values" VALUES(5,3,0,2.05734524820721190966e+02,'FINITE');
INSERT INTO "trial_values" VALUES(6,3,1,5.84720966490354854272e+00,'FINITE');
INSERT INTO "trial_values" VALUES(7,4,0,2.15265308478406353748e+02,'FINITE');
INSERT INTO "trial_values" VALUES(8,4,1,5.84720934001009506886e+00,'FINITE');
INSERT INTO "trial_values" VALUES(9,5,0,7.5,'FINITE');
INSERT INTO "trial_values" VALUES(10,5,1,2.25,'FINITE');
INSERT INTO "trial_values" VALUES(11,6,0,7.9,'FINITE');
INSERT INTO "trial_values" VALUES(12,6,1,2.26,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-30 16:34:03.619463','2026-11-30 16:34:25.980606');
INSERT INTO "trials" VALUES(2,1,1,'COMPLETE','2026-11-30 16:34:26.135029','2026-11-30 16:34:30.472359');
INSERT INTO "trials" VALUES(3,2,1,'COMPLETE','2026-11-30 16:34:30.514843','2026-11-30 16:34:32.138810');
INSERT INTO "trials" VALUES(4,3,1,'COMPLETE','2026-11-30 16:34:32.149542','2026-11-30 16:34:33.594024');
INSERT INTO "trials" VALUES(5,0,2,'COMPLETE','2026-11-30 16:35:31.817177','2026-11-30 16:35:31.823335');
INSERT INTO "trials" VALUES(6,1,2,'COMPLETE','2026-11-30 16:35:31.834446','2026-11-30 16:35:31.837860');
INSERT INTO "trials" VALUES(7,2,2,'PRUNED','2026-11-30 16:35:31.844228','2026-11-30 16:35:31.847113');
INSERT INTO "trials" VALUES(8,3,2,'PRUNED','2026-11-30 16:35:31.851459','2026-11-30 16:35:31.853655');
INSERT INTO "trials" VALUES(9,4,2,'FAIL','2026-11-30 16:35:31.856901','2026-11-30 16:35:31.859775');
INSERT INTO "trials" VALUES(10,5,2,'FAIL','2026-11-30 16:35:31.862592','2026-11-30 16:35:31.865604');
INSERT INTO "trials" VALUES(11,6,2,'PRUNED','2026-11-30 16:35:31.868950','2026-11-30 16:35:31.870704');
INSERT INTO "trials" VALUES(12,7,2,'RUNNING','2026-11-30 16:35:31.872881',NULL);
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
