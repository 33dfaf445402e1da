{{/*
What no schema can say: values that do not go together. All of them in one message, each with its name.
*/}}
{{- define "phoenix.faults" -}}
{{- $faults := list -}}
{{- $provider := .Values.autoscaling.provider | default "" -}}
{{- $url := .Values.autoscaling.prometheus.url | default "" -}}
{{- if and .Values.metricsApi.enabled (not $url) -}}
{{- $faults = append $faults "autoscaling.prometheus.url: expected the address of Prometheus with metricsApi.enabled, got none" -}}
{{- end -}}
{{- if and .Values.metricsApi.enabled (eq $provider "prometheus-adapter") -}}
{{- $faults = append $faults "metricsApi.enabled: expected false with autoscaling.provider prometheus-adapter, which serves the same API group, got true" -}}
{{- end -}}
{{- if and (eq $provider "keda") (not $url) -}}
{{- $faults = append $faults "autoscaling.prometheus.url: expected the address of Prometheus, which KEDA is to ask, with autoscaling.provider keda, got none" -}}
{{- end -}}
{{- if and .Values.secrets (not .Values.namespaces) -}}
{{- $faults = append $faults "secrets: expected none without namespaces, because a cluster-wide operator may read each Secret by its name" -}}
{{- end -}}
{{- $seen := dict -}}
{{- range $index, $backend := .Values.backends -}}
{{- $key := printf "%s %s" $backend.kind $backend.name -}}
{{- if hasKey $seen $key -}}
{{- $faults = append $faults (printf "backends.%d: expected each kind and name once, got %s twice" $index $key) -}}
{{- end -}}
{{- $_ := set $seen $key true -}}
{{- end -}}
{{- $namespaces := .Values.namespaces -}}
{{- if ne (len $namespaces) (len (uniq $namespaces)) -}}
{{- $faults = append $faults (printf "namespaces: expected each once, got %s" (join ", " $namespaces)) -}}
{{- end -}}
{{- if .Values.standalone.enabled -}}
{{- if not .Values.standalone.models -}}
{{- $faults = append $faults "standalone.models: expected a model with standalone.enabled, got none" -}}
{{- end -}}
{{- $secrets := list -}}
{{- range $name, $spec := .Values.standalone.models -}}
{{- if regexMatch "^(pvc|oci|configmap)://" $spec.model.uri -}}
{{- $faults = append $faults (printf "standalone.models.%s.model.uri: expected a path in the server's image, file, https, s3, gs or az, because other places need the operator, got %s" $name $spec.model.uri) -}}
{{- end -}}
{{- $secrets = append $secrets (dig "credentials" "secretRef" "name" "" $spec.model) -}}
{{- end -}}
{{- $secrets = uniq (compact $secrets) -}}
{{- if gt (len $secrets) 1 -}}
{{- $faults = append $faults (printf "standalone.models: expected one Secret in model.credentials of all, because they share a pod, got %s" (join ", " $secrets)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.backends (not .Values.operator.enabled) -}}
{{- $faults = append $faults "backends: expected none without operator.enabled, which makes the bindings, got some" -}}
{{- end -}}
{{- if $faults -}}
{{- fail (printf "values that do not go together:\n  %s" (join "\n  " $faults)) -}}
{{- end -}}
{{- end }}
