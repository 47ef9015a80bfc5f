-- The health of an ApiKey, from its conditions. Ready is always present; Reconciling and Stalled only while true.

local health = {}
local status = obj.status or {}

-- Conditions of an older generation do not describe this spec.
if status.observedGeneration == nil or status.observedGeneration ~= obj.metadata.generation then
  health.status = "Progressing"
  health.message = "Waiting for Keywright to observe this spec"
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local ready, stalled = conditions["Ready"], conditions["Stalled"]

if stalled ~= nil and stalled.status == "True" then
  -- The key is rejected, expired or without its Secret, and waiting does not resolve this.
  health.status = "Degraded"
  health.message = stalled.message
elseif ready ~= nil and ready.status == "True" then
  -- Also if inactive, as the spec requests. "Suspended" would block all later sync waves until the key is activated.
  health.status = "Healthy"
  health.message = ready.message
else
  health.status = "Progressing"
  health.message = ready and ready.message or "Waiting for Keywright"
end
return health
